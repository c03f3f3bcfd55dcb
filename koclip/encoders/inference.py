"""Load a published dual encoder and embed images and texts with it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers import AutoProcessor, ProcessorMixin

from koclip.config import ConfigError, DataConfig, check, check_pixels
from koclip.data.transforms import BROKEN, ImageError, decode, to_rgb
from koclip.encoders.base import TransformersEncoder, by_length, in_batches
from koclip.models import StockModel
from koclip.models.pretrained import read, refuse
from koclip.text.normalize import normalize


def load(path: str | Path, device: str | torch.device | None = None) -> tuple[StockModel, ProcessorMixin]:
    """Load a model directory or Hub repository, in fp32 and evaluation mode.

    Args:
        path: Directory that a recipe wrote as `model/`, or a Hub id.
        device: Where to put the model; default: a GPU if there is one.

    Raises:
        ConfigError: no dual encoder is there; or weights are missing, left over or of other sizes: the class and the
            file do not belong together.
    """
    model, problems = read(path, "model")
    check(isinstance(model, StockModel), "model", str(path), f"a {type(model).__name__}: expected a dual encoder")
    refuse(path, "model", model, problems)
    return model.to(usable(device)), AutoProcessor.from_pretrained(path)


def usable(device: str | torch.device | None) -> torch.device:
    """Return a device; by default a GPU if there is one.

    Raises:
        ConfigError: it is none, or cannot be used here.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device or default).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"device: got {str(device)!r}, which cannot be used here: {reason}; take cpu") from error


def embed_images(
    model: StockModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str | Path],
    batch_size: int = 64,
    max_image_pixels: int = DataConfig.max_image_pixels,
) -> torch.Tensor:
    """Return unit-norm float32 embeddings (N, D) of N images, in order, on the CPU.

    Args:
        model: What `load` returned.
        processor: Its own.
        images: PIL images or file paths. Both are turned upright by the orientation that they name, and seen as
            training and evaluation see them (`koclip.data.transforms`).
        batch_size: Images encoded at once.
        max_image_pixels: Largest width x height of a file.

    Raises:
        OSError: a file cannot be read.
        ImageError: an image cannot be used; the message names it and says why.
    """
    check_pixels("max_image_pixels", max_image_pixels)
    if not images:
        return torch.zeros(0, model.visual_projection.out_features)
    encoder = TransformersEncoder(model, processor)

    def embed(batch: list[int]) -> torch.Tensor:
        return encoder.encode_images([_open(images[place], place, max_image_pixels) for place in batch])

    return in_batches(embed, range(len(images)), batch_size, "images")


def embed_texts(
    model: StockModel, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Return unit-norm float32 embeddings (N, D) of N texts, in order, on the CPU.

    Texts are normalised to NFC and cut to the model's longest length; texts of similar length share a batch.
    """
    if not texts:
        return torch.zeros(0, model.visual_projection.out_features)
    cleaned = [normalize(text) for text in texts]
    encoder = TransformersEncoder(model, processor)
    return in_batches(encoder.encode_texts, cleaned, batch_size, "texts", by_length(cleaned))


def _open(image: Image.Image | str | Path, place: int, max_pixels: int) -> Image.Image:
    """Return an image as a model is shown it; errors name it by its path, or else by its place in the list."""
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except BROKEN as error:
            raise ImageError(f"images[{place}]: {error}") from error
    encoded = Path(image).read_bytes()
    try:
        picture: Image.Image = to_pil_image(decode(encoded, max_pixels, "max_image_pixels"))
    except ImageError as error:
        raise ImageError(f"{image}: {error}") from error
    return picture
