"""Ratings: do a model's scores of captions for images agree with people's ratings?"""

import csv
import math
from pathlib import Path

import torch

from koclip.config import ConfigError, EvalSetConfig, RatingsConfig, SourceConfig, locate
from koclip.data.sources import Row
from koclip.data.transforms import PIXEL_LIMIT, ImageError, PixelLimit, decode
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.sets import EvalSet, Ratings
from koclip.metrics import Metric, agreement
from koclip.text.normalize import normalize


def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
    """Return Kendall's tau c and b between cosine similarities and ratings.

    A caption with several ratings counts once per rating, as in Flickr8k-Expert's protocol.
    """
    assert eval_set.ratings is not None
    places, captions, ratings = zip(*eval_set.ratings.rows, strict=True)
    texts = list(dict.fromkeys(captions))
    images, embedded = embedder.images(eval_set.images), embedder.texts(texts)
    rated = [texts.index(caption) for caption in captions]
    scores = (images[list(places)] * embedded[rated]).sum(dim=1)
    people = torch.tensor(ratings)
    return {f"agreement/kendall_tau_{variant}": agreement(scores, people, variant) for variant in ("c", "b")}


def open_ratings(config: RatingsConfig, limit: PixelLimit = PIXEL_LIMIT) -> EvalSet:
    """Read a file of ratings and check its images.

    Raises:
        ConfigError: the file is missing, or a line has no caption, no rating or an image that cannot be read.
    """
    rated = read_ratings(config, limit)
    files = sorted({file for file, _, _ in rated})
    source = SourceConfig(path=config.path, name=config.name, captions={config.language: "caption"})
    return EvalSet(
        name=config.name,
        config=EvalSetConfig(source=source, tasks=[TASK.name]),
        images=Images([Row(file, {}, str(file)) for file in files], limit=limit),
        captions=[{} for _ in files],
        gallery={},
        ratings=Ratings(config.language, [(files.index(file), caption, rating) for file, caption, rating in rated]),
    )


def read_ratings(config: RatingsConfig, limit: PixelLimit = PIXEL_LIMIT) -> list[tuple[Path, str, float]]:
    """Return the image, the caption and the rating of each rating in a file.

    Raises:
        ConfigError: see `open_ratings`.
    """
    path, rated = locate(config.path), []
    if not path.is_file():
        raise ConfigError(f"ratings[].path: {path} is not a file; expected a TSV file of image, caption, ratings")
    root = Path(config.image_root) if config.image_root else path.parent
    with path.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            where = f"{path}, line {number}"
            if len(cells) < 3 or not normalize(cells[1]):
                raise ConfigError(
                    f"{where}: got {len(cells)} cells, expected image, caption and ratings, tab-separated"
                )
            image = locate(root / cells[0])
            try:
                decode(image, *limit)
                ratings = [float(cell) for cell in cells[2:]]
            except ImageError as error:
                raise ConfigError(f"{where}: {root / cells[0]} cannot be used: {error}") from None
            except ValueError:
                ratings = [math.nan]
            if not all(map(math.isfinite, ratings)):
                raise ConfigError(f"{where}: got ratings {cells[2:]}, expected finite numbers")
            rated += [(image, normalize(cells[1]), rating) for rating in ratings]
    if not rated:
        raise ConfigError(f"ratings[].path: {path} has no line; expected image, caption and ratings")
    return rated


def _check(eval_set: EvalSet) -> None:
    if eval_set.ratings is None:
        raise ConfigError(
            f"eval.sets[].tasks: ratings needs ratings, and {eval_set.name} has none; add the file under `ratings`"
        )


_MEANING = "agreement with people's ratings, Kendall's tau c"
TASK = Task(
    "ratings",
    run,
    lambda eval_set: [eval_set.ratings.language] if eval_set.ratings else [],
    (
        Spec("agreement/kendall_tau_c", "agreement with people, tau c", "number", summary=_MEANING),
        Spec("agreement/kendall_tau_b", "agreement with people, tau b", "number"),
    ),
    _check,
)
