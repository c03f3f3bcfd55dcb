"""Decode pictures to RGB, crop and corrupt them. All in uint8: the model normalises on its device."""

import dataclasses
import json
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from xxhash import xxh3_128_digest

from koclip.config import DataConfig, check

# Kinds that are read. PIL's other readers raise odd errors (SPIDER: AttributeError), decode before the size is known
# (ICO) or start another program (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
_MPO = "MPO"  # JPEGs of several pictures, which some phones write; PIL's reader of JPEG opens them
KINDS = ", ".join(_FORMATS)
# Pictures that torchvision decodes faster than PIL, to equal pixels. Not PNG: torchvision 0.29 crashes on some files,
# and returns 16 bits for others.
_DIRECT = {(kind, mode) for kind in ("JPEG", _MPO) for mode in ("RGB", "L")}
# How to turn a picture (H, W, 3) upright, by its EXIF orientation (1 is upright): whether to swap rows and columns, and
# then the axes to mirror.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
_WHITE_IS_ZERO = 0  # value of PhotometricInterpretation in a TIFF
# Longer side divided by shorter side. With a shorter side of 512 pixels, more than most models take, a picture of this
# ratio has 79 million pixels.
MAX_RATIO = 300
# Errors of PIL and torchvision on broken files. SyntaxError: broken PNG in PIL; RuntimeError: libjpeg.
BROKEN = (
    *(OSError, SyntaxError, ValueError, LookupError, RuntimeError, EOFError, ArithmeticError, TypeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_PIL_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


class ImageError(ValueError):
    """A picture that cannot be used. The message says why."""


class MissingError(ValueError):
    """An image or a sentence without a stored embedding. The message says why."""


class PixelLimit(NamedTuple):
    """The most pixels (width x height) that a picture may have, and the configuration key that sets it."""

    pixels: int = DataConfig.max_image_pixels
    key: str = "data.max_image_pixels"


PIXEL_LIMIT = PixelLimit()  # the default


def suffixes() -> frozenset[str]:
    """Return the suffixes of readable pictures in lower case: `.jpg` and so on."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*_FORMATS, _MPO))


def read(image: bytes | Path | npt.NDArray[np.uint8] | None) -> bytes | npt.NDArray[np.uint8]:
    """Return the content of an image; a path is read.

    Raises:
        ImageError: `image` is None, or the file cannot be read.
    """
    if image is None:
        raise ImageError("no image")
    try:
        return image.read_bytes() if isinstance(image, Path) else image
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise ImageError(f"{type(error).__name__}: {error}".split("\n")[0]) from error


def digest_of(content: bytes | npt.NDArray[np.uint8]) -> bytes:
    """Return 16 bytes that are equal for equal content."""
    return xxh3_128_digest(content if isinstance(content, bytes) else content.tobytes())


def image_id(digest: bytes) -> int:
    """Return the number of an image: 63 bits of its digest, which fit an int64."""
    return int.from_bytes(digest[:8], "little") >> 1


def decode(
    image: bytes | Path | npt.NDArray[np.uint8] | None, max_pixels: int, key: str = PIXEL_LIMIT.key
) -> torch.Tensor:
    """Return an encoded picture, its path, or RGB pixels (H, W, 3) as (3, H, W) uint8 RGB, converted as by `to_rgb`.

    `max_pixels` is the largest width x height, and `key` its configuration key, for the message.

    Raises:
        ImageError: the image is missing, broken or not an image, has more than `max_pixels` pixels, or `to_rgb` refuses
            it.
    """
    image = read(image)
    if isinstance(image, np.ndarray):
        _check_form(image.shape[1], image.shape[0])
        return torch.from_numpy(image).permute(2, 0, 1)
    try:
        return _decode(image, max_pixels, key)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image, or not one of the kinds {KINDS}") from None
    except Image.DecompressionBombError as error:  # raised before the check of the size below
        raise ImageError(f"too many pixels; {key} is {max_pixels} ({error})".split("\n")[0]) from error
    except BROKEN as error:
        raise ImageError(f"{type(error).__name__}: {error}".split("\n")[0]) from error


def _decode(data: bytes, max_pixels: int, key: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's warnings of large sizes and metadata
        with Image.open(BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels; {key} is {max_pixels}")
            _check_form(width, height)
            if (picture.format, picture.mode) in _DIRECT:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                # torchvision and PIL read different orientations if XMP stands before EXIF or the tag is not a SHORT.
                decoded: torch.Tensor = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=False)
                return _turned(decoded.permute(1, 2, 0), _orientation(picture)).permute(2, 0, 1)
            rgb = to_rgb(picture)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: upright, on white if transparent, 16-bit gray and floats scaled to 8 bits.

    The orientation is that of EXIF, else of XMP, as in PIL's `ImageOps.exif_transpose`. The result has no orientation
    in its metadata, so that it is not turned again.

    Raises:
        ImageError: one side is more than `MAX_RATIO` times the other, or the values have no known brightness: floats
            outside 0 to 1, integers of more than 16 bits, or values that would all become black.
    """
    _check_form(*picture.size)
    deep = ";16" in str(getattr(picture, "tile", ""))  # 16 bits in the file; PIL keeps the upper 8
    picture.load()  # in PNG the orientation may follow the pixels; PIL turns a TIFF when it loads it
    orientation = _orientation(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = _scaled(picture).convert("RGB")
    else:
        rgb = _on_white(picture)
        if deep and not rgb.getbbox():
            raise ImageError("16-bit values that all become black: none is above 255 of 65535; scale them")
    if orientation != 1:
        rgb = Image.fromarray(_turned(torch.from_numpy(np.array(rgb)), orientation).numpy())
    rgb.info = {}
    return rgb


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _check_form(width: int, height: int) -> None:
    """Refuse pictures that become huge when their shorter side is resized."""
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other; crop it")


def _orientation(picture: Image.Image) -> int:
    """Return the orientation that PIL reads, 1 to 8; 1 if the metadata is broken, as in every viewer."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in _TURNS else 1
    except BROKEN:
        return 1


def _turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Return pixels (H, W, 3) upright."""
    swap, mirrored = _TURNS.get(orientation, (False, ()))
    pixels = pixels.transpose(0, 1) if swap else pixels
    return pixels.flip(mirrored) if mirrored else pixels


def _scaled(picture: Image.Image) -> Image.Image:
    """Scale gray values of up to 16 bits, or floats from 0 to 1, to 8 bits.

    PIL returns the stored values of a TIFF, which may have 12 bits, or 0 for white.
    """
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    white = 1 if picture.mode == "F" else 2**bits - 1
    if not (low >= 0 and high <= white and bits <= (32 if picture.mode == "F" else 16)):  # false for nan
        expected = "expected integers of 16 bits or less, or floats from 0 to 1"
        raise ImageError(f"gray values of {low} to {high}, {values.dtype}: {expected}; scale them")
    gray = (values * 255).round().astype(np.uint8) if picture.mode == "F" else (values >> (bits - 8)).astype(np.uint8)
    if high > 0 and not gray.any():
        raise ImageError(f"gray values of {low} to {high} become black, because {white} is white; scale them")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        gray = 255 - gray
    gray[values == picture.info.get("transparency")] = 255
    return Image.fromarray(gray)


@dataclass(frozen=True)
class CentreView:
    """The view of evaluation: resize an image (3, H, W) uint8 and crop its centre."""

    resize: int | tuple[int, int]  # the shorter side, or height and width, pixels
    interpolation: str
    crop: tuple[int, int] | None  # height and width, pixels; None: no crop

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return the view (3, h, w) uint8."""
        sides = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        mode = v2.InterpolationMode(self.interpolation)
        resized: torch.Tensor = v2.functional.resize(image, sides, interpolation=mode, antialias=True)
        return resized if self.crop is None else v2.functional.center_crop(resized, list(self.crop))


class Views:
    """The views of an image, `image_size` pixels square: random crops, each with its own seed, and that of evaluation.

    The view of evaluation, `centre`, is the first view if `num_crops` is not 0. Default: CLIP's, the centre crop after
    the shorter side is resized to `image_size`.
    """

    def __init__(self, config: DataConfig, image_size: int, centre: CentreView | None = None) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        self.count, self._config, self._image_size = config.num_crops, config, image_size
        self._centre = centre or CentreView(image_size, "bicubic", (image_size, image_size))
        steps: list[v2.Transform] = []
        if config.rotation:
            steps.append(v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR, fill=255))
        steps.append(v2.RandomResizedCrop(image_size, config.crop_scale, interpolation=bicubic, antialias=True))
        if config.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
        if config.color_jitter:
            steps.append(v2.ColorJitter(*[config.color_jitter] * 3))  # brightness, contrast, saturation
        if config.grayscale:
            steps.append(v2.RandomGrayscale(config.grayscale))
        self._random = v2.Compose(steps)

    def random(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return (3, image_size, image_size) uint8 for an image (3, H, W) uint8; equal seeds give equal crops."""
        # torchvision draws from PyTorch's global CPU generator: set its seed temporarily. (torch.manual_seed would also
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
        """Return view `number` of an image (3, H, W) uint8 with this digest; view 0 is the view of evaluation."""
        if number == 0:
            return self._centre(image)
        return self.random(image, random.Random(f"view {digest.hex()} {number}").getrandbits(62))

    @property
    def description(self) -> str:
        """The settings of the views as JSON. Equal settings give equal views with the same version of torchvision."""
        settings: dict[str, Any] = {"first": dataclasses.asdict(self._centre)}
        if self.count != 1:
            names = ("crop_scale", "rotation", "horizontal_flip", "color_jitter", "grayscale")
            random = {name: getattr(self._config, name) for name in names}
            settings |= {"random": {"number": self.count - 1, "image_size": self._image_size, **random}}
        return json.dumps(settings)


def centre_view(processor: Any) -> CentreView:
    """Return the view of a stock image processor."""
    size = processor.size
    sides: int | tuple[int, int] = size["shortest_edge"] or (size["height"], size["width"])
    crop = None
    if getattr(processor, "do_center_crop", False):
        crop = (processor.crop_size["height"], processor.crop_size["width"])
    return CentreView(sides, _PIL_MODES[int(processor.resample)], crop)


def view_size(processor: Any) -> int:
    """Return the side of a stock image processor's square output, pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side: int = size["height"]
    return side


def views_for(config: DataConfig, processor: Any) -> Views:
    """Return the views of `config` with the size and the evaluation view of a stock image processor."""
    return Views(config, view_size(processor), centre_view(processor))


SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: torch.Tensor, deviation: float, generator: torch.Generator) -> torch.Tensor:
    noisy = image + 255 * deviation * torch.randn(image.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def _blur(image: torch.Tensor, relative: float) -> torch.Tensor:
    height, width = image.shape[1:]
    sigma = 0.4 + relative * min(height, width)  # a kernel below 0.4 pixels changes nothing
    radii = [min(max(1, round(3 * sigma)), side - 1) for side in (width, height)]  # a single row is not blurred
    blurred: torch.Tensor = F.gaussian_blur(image, [2 * radius + 1 for radius in radii], sigma)
    return blurred


def _pixels(image: torch.Tensor, kept: float) -> torch.Tensor:
    height, width = image.shape[1:]
    small = F.resize(image, [max(1, round(kept * height)), max(1, round(kept * width))], F.InterpolationMode.BILINEAR)
    large: torch.Tensor = F.resize(small, [height, width], F.InterpolationMode.NEAREST)
    return large


# A function of an image and a strength, and its strength at each severity.
CORRUPTIONS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "blur": (_blur, (0.004, 0.008, 0.012, 0.018, 0.026)),
    "contrast": (F.adjust_contrast, (0.6, 0.45, 0.3, 0.2, 0.1)),
    "brightness": (F.adjust_brightness, (1.2, 1.4, 1.6, 1.8, 2.1)),
    "jpeg": (F.jpeg, (40, 25, 15, 10, 5)),
    "pixels": (_pixels, (0.7, 0.55, 0.4, 0.3, 0.2)),
}


def corrupt(image: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """Return a corrupted copy of an image (3, H, W) uint8; equal seeds give equal noise.

    The kinds are from ImageNet-C (Hendrycks and Dietterich 2019), the strengths are not: they are relative to the side
    of the image, so that they look alike at 32 and at 500 pixels.

    Raises:
        ConfigError: no corruption has that name, or the severity is not 1 to 5.
    """
    check(name in CORRUPTIONS, "eval.sets[].corruptions", name, f"expected some of {list(CORRUPTIONS)}")
    check(severity in SEVERITIES, "severity", severity, "expected 1 to 5")
    change, strengths = CORRUPTIONS[name]
    options = {"generator": torch.Generator().manual_seed(seed)} if name == "noise" else {}
    corrupted: torch.Tensor = change(image, strengths[severity - 1], **options)
    return corrupted
