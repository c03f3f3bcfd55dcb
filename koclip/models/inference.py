"""Load a published dual encoder and embed images and texts with it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, ProcessorMixin

from koclip.config import ConfigError, check
from koclip.data.transforms import to_rgb
from koclip.models import StockModel
from koclip.models.encoders import TransformersEncoder, by_length, in_batches
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
) -> torch.Tensor:
    """Return unit-norm float32 embeddings (N, D) of N images (PIL images or file paths), in order, on the CPU."""

    if not images:
        return torch.zeros(0, model.visual_projection.out_features)
    encoder = TransformersEncoder(model, processor)
    return in_batches(lambda batch: encoder.encode_images([_open(one) for one in batch]), images, batch_size, "images")


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


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    with Image.open(image) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))
