"""Decode any picture to RGB and cut training crops out of it, in uint8: the model normalises on its device."""

import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

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
BROKEN = (
    *(OSError, SyntaxError, ValueError, LookupError, RuntimeError, EOFError, ArithmeticError, TypeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


_PIL_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


class ImageError(ValueError):
    """A picture that cannot be used; the message says why."""


def read(image: bytes | Path | npt.NDArray[np.uint8] | None) -> bytes | npt.NDArray[np.uint8]:
    """Return the bytes of an image that may be given by its path.

    Raises:
        ImageError: there is none, or it cannot be read.
    """
    if image is None:
        raise ImageError("no image")
    try:
        return image.read_bytes() if isinstance(image, Path) else image
    except (OSError, ValueError) as error:  # ValueError: no file has such a name
        raise ImageError(f"{type(error).__name__}: {error}".split("\n")[0]) from error


def decode(image: bytes | Path | npt.NDArray[np.uint8] | None, max_pixels: int) -> torch.Tensor:
    """Return an image as (3, H, W) uint8 RGB, upright by its EXIF tag, transparency on white.

    Args:
        image: An encoded picture, the path of one, or decoded RGB pixels (H, W, 3).
        max_pixels: Largest width x height.

    Raises:
        ImageError: it is missing, truncated, no image, or has more than `max_pixels` pixels.
    """
    image = read(image)
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image).permute(2, 0, 1)
    try:
        return _decode(image, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a kind that PIL does not read") from None
    except BROKEN as error:
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


class Views:
    """What a model is shown of an image: random crops, drawn from a seed of their own, or the view of evaluation.

    Args:
        config: `crop_scale` and the other augmentations; `num_crops` of them per image, 0 for a new one each time.
        image_size: Side of a view, pixels.
        centre: What evaluation shows, which is an image's first view where `num_crops` is not 0; default: CLIP's way,
            the shorter side resized to `image_size` and the middle cut out.
    """

    def __init__(self, config: DataConfig, image_size: int, centre: v2.Transform | None = None) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        resize = v2.Resize(image_size, interpolation=bicubic, antialias=True)
        self.count = config.num_crops
        self._centre = centre or v2.Compose([resize, v2.CenterCrop(image_size)])
        steps: list[v2.Transform] = []
        if config.rotation:
            steps.append(v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR, fill=255))
        steps.append(v2.RandomResizedCrop(image_size, config.crop_scale, interpolation=bicubic, antialias=True))
        if config.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
        if config.color_jitter:
            jitter = config.color_jitter
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        if config.grayscale:
            steps.append(v2.RandomGrayscale(config.grayscale))
        self._random = v2.Compose(steps)

    def random(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return (3, image_size, image_size) uint8 for an image (3, H, W) uint8; equal seeds give equal crops."""
        # torchvision draws from PyTorch's global CPU generator: lend it this seed. (torch.manual_seed would also
        # seed every accelerator, a hundred times slower.)
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            cropped: torch.Tensor = self._random(image)
        finally:
            generator.set_state(state)
        return cropped

    def numbered(self, image: torch.Tensor, digest: bytes, number: int) -> torch.Tensor:
        """Return view `number` of an image (3, H, W) uint8 whose content has this digest; view 0 is evaluation's."""
        if number == 0:
            centred: torch.Tensor = self._centre(image)
            return centred
        return self.random(image, random.Random(f"view {digest.hex()} {number}").getrandbits(62))

    def __repr__(self) -> str:
        """Describe the views: equal texts make equal views of an image."""
        return f"{self._centre}" if self.count == 1 else f"{self._centre} and {self.count - 1} of {self._random}"


def centre_view(processor: Any) -> v2.Transform:
    """Return the resizing and cropping of a stock image processor, for uint8 tensors (3, H, W)."""
    size = processor.size
    sides: int | list[int] = size["shortest_edge"] or [size["height"], size["width"]]
    interpolation = v2.functional.InterpolationMode(_PIL_MODES[int(processor.resample)])
    steps: list[v2.Transform] = [v2.Resize(sides, interpolation=interpolation, antialias=True)]
    if getattr(processor, "do_center_crop", False):
        steps.append(v2.CenterCrop([processor.crop_size["height"], processor.crop_size["width"]]))
    return v2.Compose(steps)


def view_size(processor: Any) -> int:
    """Return the side of the square that a stock image processor makes, pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side: int = size["height"]
    return side
