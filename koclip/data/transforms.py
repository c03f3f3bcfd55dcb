"""Decode any picture to RGB and cut training crops out of it, in uint8: the model normalises on its device."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from koclip.config import DataConfig

# Kinds that are read. PIL's other readers break in ways of their own (SPIDER: AttributeError), decode before their size
# is known (ICO) or start another program (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pictures that torchvision decodes faster than PIL, to the same pixels. PNG is not among them: torchvision 0.29
# crashes the process on some broken ones, and returns 16 bits for others.
_DIRECT = {("JPEG", "RGB"), ("JPEG", "L")}


# What PIL and torchvision raise on broken files. SyntaxError: PIL's broken PNG; RuntimeError: libjpeg.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, LookupError, RuntimeError, EOFError, ArithmeticError, TypeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class ImageError(ValueError):
    """A picture that cannot be used; the message says why."""


def decode(image: bytes | Path | npt.NDArray[np.uint8] | None, max_pixels: int) -> torch.Tensor:
    """Return an image as (3, H, W) uint8 RGB, upright by its EXIF tag, transparency on white.

    Args:
        image: An encoded picture, the path of one, or decoded RGB pixels (H, W, 3).
        max_pixels: Largest width x height.

    Raises:
        ImageError: it is missing, truncated, no image, or has more than `max_pixels` pixels.
    """
    if image is None:
        raise ImageError("no image")
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image).permute(2, 0, 1)
    try:
        return _decode(image.read_bytes() if isinstance(image, Path) else image, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a kind that PIL does not read") from None
    except _BROKEN as error:
        raise ImageError(f"{type(error).__name__}: {error}".split("\n")[0]) from error


def _decode(data: bytes, max_pixels: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's bomb and metadata warnings; the size is checked below
        with Image.open(BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels; data.max_image_pixels is {max_pixels}")
            if (picture.format, picture.mode) in _DIRECT:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                decoded: torch.Tensor = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                return decoded
            rgb = to_rgb(ImageOps.exif_transpose(picture))
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB: transparency on white, 16-bit scaled to 8."""
    if picture.mode.startswith("I"):
        wide = np.asarray(picture, dtype=np.int64)
        return Image.fromarray((wide.clip(0, 65_535) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


class TrainTransform:
    """The random crop and the other augmentations that `data` names, of one image, drawn from a seed of its own."""

    def __init__(self, config: DataConfig, image_size: int) -> None:
        steps: list[v2.Transform] = []
        if config.rotation:
            steps.append(v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR, fill=255))
        bicubic = v2.InterpolationMode.BICUBIC
        steps.append(v2.RandomResizedCrop(image_size, config.crop_scale, interpolation=bicubic, antialias=True))
        if config.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
        if config.color_jitter:
            jitter = config.color_jitter
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        if config.grayscale:
            steps.append(v2.RandomGrayscale(config.grayscale))
        self._transform = v2.Compose(steps)

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return (3, image_size, image_size) uint8 for an image (3, H, W) uint8; equal seeds give equal crops."""
        # torchvision draws from PyTorch's global CPU generator: lend it this seed. (torch.manual_seed would also
        # seed every accelerator, a hundred times slower.)
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            cropped: torch.Tensor = self._transform(image)
        finally:
            generator.set_state(state)
        return cropped
