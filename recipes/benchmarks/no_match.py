"""How often a search shows something for a query without a match: a calibrated threshold against one flat cut-off.

    python recipes/benchmarks/no_match.py --models runs/a/model runs/b/model runs/c/model
    python recipes/benchmarks/no_match.py --models runs/a/model --captions 1

Bar of the project: over 200 random splits of the images (half calibrates, half tests), captions whose image was removed
show something in alpha +- 1 point, for alpha 5, 10 and 20 %. The flat cut-off is the best that one number can do: it is
calibrated on the captions of all models together. `kept` is the share of captions that show their image when it is
there. The range has 95 % of the halves. Embeddings are cached; the rest takes seconds per model and language.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

import koclip
from koclip.classifiers.conformal import ALPHAS, highest_without_match
from koclip.config import EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder, collect
from koclip.evaluation.sets import open_set
from koclip.evaluation.tasks.no_match import Scores, halves, per_image, scores_of


class Row(NamedTuple):
    """What was measured for a model, a language and an alpha; all shares in percent."""

    model: str
    language: str
    alpha: float
    shown: float  # of the captions without their image
    low: float  # 95 % of the halves are from low to high
    high: float
    kept: float  # of the captions with their image
    flat_shown: float  # the same with the flat cut-off
    flat_kept: float


def measure(models: Mapping[str, Scores], language: str, alpha: float, splits: int) -> list[Row]:
    """Return a row for each model. All have scores of the same captions, and are split in the same way."""
    drawn = [list(halves(scores, alpha, splits, seed=0)) for scores in models.values()]
    flat = []
    for same in tqdm(list(zip(*drawn, strict=True)), desc=f"{language}, {alpha:.0%}", leave=False):
        others = [scores.others[~half.tested] for scores, half in zip(models.values(), same, strict=True)]
        images = [scores.images[~half.tested] for scores, half in zip(models.values(), same, strict=True)]
        flat.append(highest_without_match(torch.cat(others), alpha, torch.cat(images)))
    rows = []
    for (name, scores), own in zip(models.items(), drawn, strict=True):
        shown, kept, flat_shown, flat_kept = (
            [
                above(part, scores.images, half.tested, threshold)
                for half, threshold in zip(own, thresholds, strict=True)
            ]
            for thresholds in ([half.threshold for half in own], flat)
            for part in (scores.others, scores.own)
        )
        low, high = np.quantile(shown, [0.025, 0.975]).tolist()
        means = [statistics.mean(part) for part in (kept, flat_shown, flat_kept)]
        rows.append(Row(name, language, 100 * alpha, statistics.mean(shown), low, high, *means))
    return rows


def above(scores: torch.Tensor, images: torch.Tensor, tested: torch.Tensor, threshold: float) -> float:
    """Return the percentage of the tested scores above a threshold; each image weighs the same."""
    return 100 * float(per_image((scores[tested] > threshold).float(), images[tested]).mean())


def scores_by_language(args: argparse.Namespace) -> dict[str, dict[str, Scores]]:
    """Return the scores by language and model. Embeddings in the cache are not computed again."""
    eval_set = open_set(EvalSetConfig(source=SourceConfig(path=args.data), tasks=["no_match"]))
    captions = {
        language: collect([own[: args.captions] for own in eval_set.texts(language)], [])
        for language in args.languages or eval_set.languages
    }
    scores: dict[str, dict[str, Scores]] = {language: {} for language in captions}
    for model in args.models:
        embedder = Embedder(koclip.load(model, args.device), args.batch_size, Path(args.cache_dir))
        images = embedder.images(eval_set.images)
        for language, own in captions.items():
            scores[language][name_of(model)] = scores_of(own, images, embedder.texts(own.texts))
    return scores


def name_of(model: str) -> str:
    """Return the folder of the run for a path such as runs/mine/model."""
    return model.removesuffix("/").removesuffix("/model").rpartition("/")[2]


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| model | captions | alpha | shown | 95 % of halves | kept | flat: shown | flat: kept |"]
    lines.append("|---" * 8 + "|")
    lines += [
        f"| {row.model} | {row.language} | {row.alpha:.0f} | {row.shown:.1f} | {row.low:.1f}-{row.high:.1f} | "
        f"{row.kept:.1f} | {row.flat_shown:.1f} | {row.flat_kept:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument(
        "--data",
        default="data/flickr8k_ko/val.parquet",
        help="Parquet file with image, captions_ko and captions_en (default: %(default)s)",
    )
    options.add_argument("--models", nargs="+", required=True, help="two or more for a flat cut-off")
    options.add_argument("--languages", nargs="+", help="of the captions; default: all")
    options.add_argument("--captions", type=int, help="first captions of each image; default: all")
    options.add_argument("--splits", type=int, default=200, help="random splits; each half calibrates once")
    options.add_argument("--cache_dir", default="runs/embeddings")
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--device", default=None)
    return options


def main() -> None:
    """Measure and print."""
    args = parser().parse_args()
    rows = [
        row
        for language, models in scores_by_language(args).items()
        for alpha in ALPHAS
        for row in measure(models, language, alpha, args.splits)
    ]
    print(table(rows))
    print(f"farthest from alpha: calibrated {max(abs(row.shown - row.alpha) for row in rows):.1f} points, ", end="")
    print(f"flat {max(abs(row.flat_shown - row.alpha) for row in rows):.1f} points")


if __name__ == "__main__":
    main()
