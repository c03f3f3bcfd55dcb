"""The step for pictures: whether they can be decoded, their size, their form, and whether they are almost uniform."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional as F

from koclip.config.curation import CurateConfig, PictureRules
from koclip.curation.batch import IMAGE, Batch, drop, kept_places
from koclip.data.transforms import ImageError, decode, digest_of, image_id, read

PIXELS, PICTURE = "pixels", "picture"  # columns: width x height, and a hash of the stored picture
SIDE = 64  # of a thumbnail, pixels
THUMBNAIL = "thumbnail"  # column that is not stored
_BRIGHTNESS = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


def filter_pictures(batch: Batch, config: CurateConfig) -> Batch:
    """Drop rows by their pictures, and add the columns pixels, picture and thumbnail (None for dropped rows)."""
    size = len(batch[IMAGE])
    columns: Batch = {PIXELS: [0] * size, PICTURE: [0] * size, THUMBNAIL: [None] * size}
    reasons = {}
    for place in kept_places(batch):
        try:
            content = read(batch[IMAGE][place])
            pixels = decode(content, config.pictures.max_pixels, "pictures.max_pixels")
        except ImageError as error:
            reasons[place] = ("no picture" if batch[IMAGE][place] is None else "broken picture", str(error))
            continue
        height, width = pixels.shape[1:]
        thumbnail, deviation = gray_thumbnail(pixels)
        if problem := _problem(width, height, deviation, config.pictures):
            reasons[place] = problem
            continue
        columns[PIXELS][place] = width * height
        columns[PICTURE][place] = image_id(digest_of(content))
        columns[THUMBNAIL][place] = thumbnail
    return drop(batch | columns, reasons)


def gray_thumbnail(pixels: torch.Tensor) -> tuple[npt.NDArray[np.float32], float]:
    """Return the brightness of an image (3, H, W) uint8, squashed to (SIDE, SIDE), and its standard deviation."""
    gray = torch.einsum("chw,c->hw", pixels.float(), _BRIGHTNESS)
    small: Any = F.resize(gray[None], [SIDE, SIDE], F.InterpolationMode.BILINEAR, antialias=True)
    return small[0].numpy(), float(gray.std(correction=0))


def _problem(width: int, height: int, deviation: float, rules: PictureRules) -> tuple[str, str] | None:
    shorter, longer = sorted((width, height))
    if shorter < rules.min_side:
        return "small picture", f"{width} x {height} pixels"
    if longer > rules.max_ratio * shorter:
        return "long picture", f"{width} x {height} pixels"
    if deviation < rules.min_deviation:
        return "uniform picture", f"standard deviation {deviation:.2f}"
    return None
