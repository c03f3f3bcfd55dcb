"""Load a published dual encoder and embed images and texts with it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoProcessor, ProcessorMixin

from koclip.config import check
from koclip.data.transforms import to_rgb
from koclip.models import StockModel
from koclip.models.dual_encoder import encode_images, encode_texts
from koclip.models.pretrained import read, refuse
from koclip.text import tokenizers
from koclip.text.normalize import normalize

_PROGRESS_FROM = 10  # batches; shorter work shows no bar


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
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device or default), AutoProcessor.from_pretrained(path)


def embed_images(
    model: StockModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str | Path],
    batch_size: int = 64,
) -> torch.Tensor:
    """Return unit-norm float32 embeddings (N, D) of N images (PIL images or file paths), in order, on the CPU."""

    def embed(places: Sequence[int]) -> torch.Tensor:
        pictures = [_open(images[place]) for place in places]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return encode_images(model, pixels.to(model.device, model.dtype))

    return _in_batches(model, embed, list(range(len(images))), batch_size, "images")


def embed_texts(
    model: StockModel, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Return unit-norm float32 embeddings (N, D) of N texts, in order, on the CPU.

    Texts are normalised to NFC and cut to the model's longest length; texts of similar length share a batch.
    """
    cleaned = [normalize(text) for text in texts]

    def embed(places: Sequence[int]) -> torch.Tensor:
        encoded: Any = tokenizers.encode(
            processor.tokenizer, [cleaned[place] for place in places], padding=True, return_tensors="pt"
        ).to(model.device)
        return encode_texts(model, encoded["input_ids"], encoded["attention_mask"])

    by_length = sorted(range(len(cleaned)), key=lambda place: len(cleaned[place]))
    return _in_batches(model, embed, by_length, batch_size, "texts")


def _in_batches(
    model: StockModel,
    embed: Callable[[Sequence[int]], torch.Tensor],
    places: Sequence[int],
    batch_size: int,
    unit: str,
) -> torch.Tensor:
    """Embed `places` in batches and return the rows in place order."""
    embeddings = torch.zeros(len(places), model.visual_projection.out_features)
    starts = range(0, len(places), batch_size)
    with _evaluating(model), torch.inference_mode():
        for start in tqdm(starts, desc=f"embedding {unit}", leave=False, disable=len(starts) < _PROGRESS_FROM):
            part = places[start : start + batch_size]
            embeddings[list(part)] = embed(part).float().cpu()
    return embeddings


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in the mode it was in: a frozen tower's is not the model's."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    with Image.open(image) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))
