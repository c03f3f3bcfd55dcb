"""How well does the pair score of `koclip curate` find wrong pairs? The area under the ROC curve (AUC) of planted ones.

koclip data flickr8k_ko
koclip align --config align/real_projection --output_dir runs/scorer --align.cache_dir runs/features/scorer \
  --data.sources "[{path: data/flickr8k_ko/train.parquet, split: 'train[:2000]', captions: {ko: captions_ko}}]" \
  --train.num_steps 250 --eval.sets "[]"
python recipes/benchmarks/curation_scores.py --model runs/scorer/model
python recipes/benchmarks/curation_scores.py --model google/siglip2-base-patch16-224

The rows are 500 photos that the scorer of the first command has not seen, and that no evaluation has. A share of them
exchange their captions. The AUC is the probability that a right pair has a higher score than a wrong pair. Each row is
scored with its first caption alone, as pairs of the web have, and with all of its five captions.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pairs import FLICKR8K_KO
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2.functional import to_pil_image

from koclip.config import DataConfig, SourceConfig
from koclip.curation.scores import pair_scores
from koclip.data.sources import open_source
from koclip.data.transforms import decode, read
from koclip.encoders import load
from koclip.text.normalize import usable

Scores = npt.NDArray[np.float32]
_DRAWS = 200  # of the bootstrap


class Measured(NamedTuple):
    """AUC, its 95 % interval, and the share of wrong pairs among the dropped, if as many are dropped as are wrong."""

    auc: float
    low: float
    high: float
    dropped: float


def main(words: Sequence[str] | None = None) -> None:
    """Score the rows, and print the AUC for the first caption and for all captions of a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a spec of koclip.load")
    parser.add_argument("--data", default=str(FLICKR8K_KO), help="table of the pairs")
    parser.add_argument("--split", default="train[4000:4500]", help="rows of the table")
    parser.add_argument("--share", type=float, default=0.3, help="share of the rows that exchange their captions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of these rows")
    args = parser.parse_args(words)
    source = SourceConfig(path=args.data, split=args.split, captions={"ko": "captions_ko"})
    rows = list(open_source(source).iter_rows())
    pictures: list[Image.Image] = [
        to_pil_image(decode(read(row.image), DataConfig.max_image_pixels, "max_image_pixels")) for row in rows
    ]
    captions, wrong = exchanged([usable(row.captions["ko"]) for row in rows], args.share, args.seed)
    encoder = load(args.model)
    images = encoder.encode_images(pictures).numpy()
    print(f"{args.model}: {len(rows)} rows, {wrong.sum()} with the captions of another row")
    for name, count in (("first caption", 1), ("all captions", None)):
        result = measure(pair_scores(encoder, images, [texts[:count] for texts in captions]), wrong)
        print(f"{name}: AUC {result.auc:.4f} ({result.low:.4f}-{result.high:.4f}); dropped {wrong.sum()} rows with the")
        print(f"  lowest scores: {result.dropped:.1%} of them are wrong pairs")


def exchanged(captions: Sequence[list[str]], share: float, seed: int) -> tuple[list[list[str]], npt.NDArray[np.bool_]]:
    """Exchange the captions of a share of the rows; return all captions, and (N,) whether a row has wrong captions."""
    places = np.random.default_rng(seed).permutation(len(captions))[: round(share * len(captions))]
    mixed, wrong = list(captions), np.zeros(len(captions), bool)
    for place, other in zip(places.tolist(), np.roll(places, 1).tolist(), strict=True):
        mixed[place], wrong[place] = captions[other], True
    return mixed, wrong


def measure(scores: Scores, wrong: npt.NDArray[np.bool_]) -> Measured:
    """Return how well low scores (N,) find the wrong pairs (N,); the interval is a bootstrap over the rows."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(scores), size=len(scores)) for _ in range(_DRAWS))
    areas = [roc_auc_score(~wrong[draw], scores[draw]) for draw in draws]
    lowest = np.argsort(scores, kind="stable")[: wrong.sum()]
    low, high = np.quantile(areas, [0.025, 0.975])
    return Measured(float(roc_auc_score(~wrong, scores)), float(low), float(high), float(wrong[lowest].mean()))


if __name__ == "__main__":
    main()
