"""Decode any picture to RGB, cut training crops out of it, corrupt it; in uint8: the model normalises on its device."""

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

# Kinds that are read. PIL's other readers break in ways of their own (SPIDER: AttributeError), decode before their size
# is known (ICO) or start another program (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
_MPO = "MPO"  # JPEGs with further pictures after the first, as phones write them; PIL's reader of JPEG opens them
KINDS = ", ".join(_FORMATS)
# Pictures that torchvision decodes faster than PIL, to the same pixels. PNG is not among them: torchvision 0.29
# crashes the process on some broken ones, and returns 16 bits for others.
_DIRECT = {(kind, mode) for kind in ("JPEG", _MPO) for mode in ("RGB", "L")}
# EXIF's orientations but 1, upright: how a picture (H, W, 3) is turned upright. Whether rows and columns change places,
# and the axes that are mirrored then.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
_WHITE_IS_ZERO = 0  # a TIFF's PhotometricInterpretation
# Longer side over shorter side. The shorter side is resized to what a model sees: at 512 pixels, more than most image
# towers see, the whole then has 79 million pixels.
MAX_RATIO = 300


# What PIL and torchvision raise on broken files. SyntaxError: PIL's broken PNG; RuntimeError: libjpeg.
BROKEN = (
    *(OSError, SyntaxError, ValueError, LookupError, RuntimeError, EOFError, ArithmeticError, TypeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


_PIL_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


class ImageError(ValueError):
    """A picture that cannot be used; the message says why."""


class PixelLimit(NamedTuple):
    """The most pixels of a picture (width x height), and the key of the configuration that sets it."""

    pixels: int = DataConfig.max_image_pixels
    key: str = "data.max_image_pixels"


PIXEL_LIMIT = PixelLimit()  # where no configuration says another


def suffixes() -> frozenset[str]:
    """Return the suffixes of files that hold pictures of the kinds that are read, in lower case: `.jpg` and so on."""
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS or kind == _MPO
    )


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


def digest_of(content: bytes | npt.NDArray[np.uint8]) -> bytes:
    """Return 16 bytes that are equal for equal content."""
    return xxh3_128_digest(content if isinstance(content, bytes) else content.tobytes())


def image_id(digest: bytes) -> int:
    """Return the number of an image with this digest: 63 bits of it, which fit an int64."""
    return int.from_bytes(digest[:8], "little") >> 1


def decode(
    image: bytes | Path | npt.NDArray[np.uint8] | None, max_pixels: int, key: str = PIXEL_LIMIT.key
) -> torch.Tensor:
    """Return an image as (3, H, W) uint8 RGB, as `to_rgb` makes it.

    Args:
        image: An encoded picture, the path of one, or decoded RGB pixels (H, W, 3).
        max_pixels: Largest width x height.
        key: Of the configuration, which sets `max_pixels`.

    Raises:
        ImageError: it is missing, truncated, no image, has more than `max_pixels` pixels or an extreme form, or its
            values have no agreed brightness.
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
        raise ImageError(f"not an image, or of a kind that PIL does not read here: expected {KINDS}") from None
    except Image.DecompressionBombError as error:  # raised before the size is known here
        raise ImageError(f"too many pixels; {key} is {max_pixels} ({error})".split("\n")[0]) from error
    except BROKEN as error:
        raise ImageError(f"{type(error).__name__}: {error}".split("\n")[0]) from error


def _decode(data: bytes, max_pixels: int, key: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's bomb and metadata warnings; the size is checked below
        with Image.open(BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels; {key} is {max_pixels}")
            _check_form(width, height)
            if (picture.format, picture.mode) in _DIRECT:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                # torchvision reads another orientation than PIL of some files: of those with XMP before EXIF, and of
                # tags that are no SHORT.
                decoded: torch.Tensor = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=False)
                return _turned(decoded.permute(1, 2, 0), _orientation(picture)).permute(2, 0, 1)
            rgb = to_rgb(picture)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: upright, transparency on white, gray of 16 bits and floats scaled to 8 bits.

    Upright is as PIL's `ImageOps.exif_transpose` has it: by the orientation in EXIF, else that in XMP. The picture
    that is returned names no orientation, so that it is not turned again.

    Raises:
        ImageError: one side is more than `MAX_RATIO` times the other, or its values have no agreed brightness: floats
            other than 0 to 1, integers of more than 16 bits, and those that would come out black.
    """
    _check_form(*picture.size)
    deep = ";16" in str(getattr(picture, "tile", ""))  # of 16 bits in the file, of which PIL keeps the higher 8
    picture.load()  # in PNG the orientation may come after the pixels; PIL turns TIFF as it loads it
    orientation = _orientation(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = _scaled(picture).convert("RGB")
    else:
        rgb = _on_white(picture)
        if deep and not rgb.getbbox():
            raise ImageError("values of 16 bits that all come out black: none is above 255 of 65535; scale them")
    if orientation != 1:
        rgb = Image.fromarray(_turned(torch.from_numpy(np.array(rgb)), orientation).numpy())
    rgb.info = {}
    return rgb


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _check_form(width: int, height: int) -> None:
    """Refuse pictures so narrow that resizing the shorter side makes them huge."""
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other, and resizing the shorter "
            "one would make a huge picture; crop it"
        )


def _orientation(picture: Image.Image) -> int:
    """Return the orientation that PIL reads, 1 to 8. Metadata that cannot be read turn nothing, as in every viewer."""
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
    """Scale gray values of 16 bits, or floats of 0 to 1, to 8 bits.

    PIL hands out the values of a TIFF as they are stored, of 12 bits or with white as 0 too.
    """
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    white = 1 if picture.mode == "F" else 2**bits - 1
    if not (low >= 0 and high <= white and bits <= (32 if picture.mode == "F" else 16)):  # nan is neither
        raise ImageError(
            f"gray values of {low} to {high}, {values.dtype}: expected integers of 16 bits or less, or floats of 0 to "
            "1; scale them"
        )
    gray = (values * 255).round().astype(np.uint8) if picture.mode == "F" else (values >> (bits - 8)).astype(np.uint8)
    if high > 0 and not gray.any():
        raise ImageError(f"gray values of {low} to {high}, which come out black where {white} is white; scale them")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        gray = 255 - gray
    gray[values == picture.info.get("transparency")] = 255
    return Image.fromarray(gray)


@dataclass(frozen=True)
class CentreView:
    """The view of evaluation: an image (3, H, W) uint8 is resized, and its middle cut out."""

    resize: int | tuple[int, int]  # the shorter side, or height and width, pixels
    interpolation: str
    crop: tuple[int, int] | None  # height and width, pixels; None: nothing is cut off

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return the view (3, h, w) uint8."""
        sides = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        mode = v2.InterpolationMode(self.interpolation)
        resized: torch.Tensor = v2.functional.resize(image, sides, interpolation=mode, antialias=True)
        return resized if self.crop is None else v2.functional.center_crop(resized, list(self.crop))


class Views:
    """What a model is shown of an image: random crops, drawn from a seed of their own, or the view of evaluation.

    Args:
        config: `crop_scale` and the other augmentations; `num_crops` of them per image, 0 for a new one each time.
        image_size: Side of a view, pixels.
        centre: What evaluation shows, which is an image's first view where `num_crops` is not 0; default: CLIP's way,
            the shorter side resized to `image_size` and the middle cut out.
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
            return self._centre(image)
        return self.random(image, random.Random(f"view {digest.hex()} {number}").getrandbits(62))

    @property
    def description(self) -> str:
        """The settings of the views as JSON: those of equal settings are equal in one version of torchvision."""
        settings: dict[str, Any] = {"first": dataclasses.asdict(self._centre)}
        if self.count != 1:
            names = ("crop_scale", "rotation", "horizontal_flip", "color_jitter", "grayscale")
            random = {name: getattr(self._config, name) for name in names}
            settings |= {"random": {"number": self.count - 1, "image_size": self._image_size, **random}}
        return json.dumps(settings)


def centre_view(processor: Any) -> CentreView:
    """Return the resizing and cropping of a stock image processor, for uint8 tensors (3, H, W)."""
    size = processor.size
    sides: int | tuple[int, int] = size["shortest_edge"] or (size["height"], size["width"])
    crop = None
    if getattr(processor, "do_center_crop", False):
        crop = (processor.crop_size["height"], processor.crop_size["width"])
    return CentreView(sides, _PIL_MODES[int(processor.resample)], crop)


def view_size(processor: Any) -> int:
    """Return the side of the square that a stock image processor makes, pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side: int = size["height"]
    return side


def views_for(config: DataConfig, processor: Any) -> Views:
    """Return the views of `config` in the size of a stock image processor, whose own is the view of evaluation."""
    return Views(config, view_size(processor), centre_view(processor))


_Corruption = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]  # of an image and a severity, 0 to 4
SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    deviation = 255 * (0.04, 0.08, 0.12, 0.18, 0.26)[severity]
    noisy = image + deviation * torch.randn(image.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def _blur(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    relative = (0.004, 0.008, 0.012, 0.018, 0.026)[severity]
    sigma = 0.4 + relative * min(image.shape[1:])  # a kernel below 0.4 pixels changes nothing
    height, width = image.shape[1:]
    radii = [min(max(1, round(3 * sigma)), side - 1) for side in (width, height)]  # one row alone is not blurred
    blurred: torch.Tensor = F.gaussian_blur(image, [2 * radius + 1 for radius in radii], sigma)
    return blurred


def _contrast(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    adjusted: torch.Tensor = F.adjust_contrast(image, (0.6, 0.45, 0.3, 0.2, 0.1)[severity])
    return adjusted


def _brightness(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    adjusted: torch.Tensor = F.adjust_brightness(image, (1.2, 1.4, 1.6, 1.8, 2.1)[severity])
    return adjusted


def _jpeg(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    compressed: torch.Tensor = F.jpeg(image, (40, 25, 15, 10, 5)[severity])
    return compressed


def _pixels(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    height, width = image.shape[1:]
    kept = (0.7, 0.55, 0.4, 0.3, 0.2)[severity]
    small = F.resize(image, [max(1, round(kept * height)), max(1, round(kept * width))], F.InterpolationMode.BILINEAR)
    large: torch.Tensor = F.resize(small, [height, width], F.InterpolationMode.NEAREST)
    return large


CORRUPTIONS: dict[str, _Corruption] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixels": _pixels,
}


def corrupt(image: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """Return a corrupted copy of an image (3, H, W) uint8; equal seeds give equal noise.

    The kinds are from ImageNet-C (Hendrycks and Dietterich 2019). The strengths are not: they are relative to the
    image's side, so that they look alike on 32 and on 500 pixels.

    Raises:
        ConfigError: there is no such corruption, or the severity is not 1 to 5.
    """
    check(name in CORRUPTIONS, "eval.sets[].corruptions", name, f"expected some of {list(CORRUPTIONS)}")
    check(severity in SEVERITIES, "severity", severity, "expected 1 to 5")
    return CORRUPTIONS[name](image, severity - 1, torch.Generator().manual_seed(seed))
