"""Do a model's scores of captions for images agree with people's ratings?"""

import csv
import math
from pathlib import Path

import torch

from koclip.config import ConfigError, RatingsConfig, locate
from koclip.data.sources import Row
from koclip.data.transforms import PIXEL_LIMIT, ImageError, PixelLimit, decode
from koclip.evaluation.embed import Embedder
from koclip.evaluation.images import Pictures
from koclip.metrics import Metric, agreement
from koclip.text.normalize import normalize


def people(embedder: Embedder, config: RatingsConfig, limit: PixelLimit = PIXEL_LIMIT) -> dict[str, Metric]:
    """Return Kendall's tau c and b between cosine similarities and ratings.

    A caption that several people rated stands there once per rating, as in Flickr8k-Expert's protocol.

    Raises:
        ConfigError: the file is missing, or a line has no caption, no rating or an image that cannot be read.
    """
    rated = read_ratings(config, limit)
    files = sorted({file for file, _, _ in rated})
    texts = list(dict.fromkeys(caption for _, caption, _ in rated))
    images = embedder.images(Pictures([Row(file, {}, str(file)) for file in files], limit=limit))
    embedded = embedder.texts(texts)
    at = [files.index(file) for file, _, _ in rated]
    said = [texts.index(caption) for _, caption, _ in rated]
    scores = (images[at] * embedded[said]).sum(dim=1)
    ratings = torch.tensor([rating for _, _, rating in rated])
    return {f"agreement/kendall_tau_{variant}": agreement(scores, ratings, variant) for variant in ("c", "b")}


def read_ratings(config: RatingsConfig, limit: PixelLimit = PIXEL_LIMIT) -> list[tuple[Path, str, float]]:
    """Return image, caption and rating, one for each rating.

    Raises:
        ConfigError: see `people`.
    """
    path, rated = locate(config.path), []
    if not path.is_file():
        raise ConfigError(f"ratings[].path: {path} is no file; expected a TSV file of image, caption, ratings")
    root = Path(config.image_root) if config.image_root else path.parent
    with path.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            where = f"{path}, line {number}"
            if len(cells) < 3 or not normalize(cells[1]):
                raise ConfigError(
                    f"{where}: got {len(cells)} cells, expected image, caption and ratings, tab-separated"
                )
            try:
                image = locate(root / cells[0])
                decode(image, *limit)
                ratings = [float(cell) for cell in cells[2:]]
            except ImageError as error:
                raise ConfigError(f"{where}: {root / cells[0]} cannot be used: {error}") from None
            except ValueError:
                raise ConfigError(f"{where}: got ratings {cells[2:]}, expected numbers") from None
            if not all(math.isfinite(rating) for rating in ratings):
                raise ConfigError(f"{where}: got ratings {cells[2:]}, expected finite numbers")
            rated += [(image, normalize(cells[1]), rating) for rating in ratings]
    if not rated:
        raise ConfigError(f"ratings[].path: {path} has no line; expected image, caption and ratings")
    return rated
