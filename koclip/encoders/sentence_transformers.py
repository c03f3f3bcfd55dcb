"""Two models of sentence-transformers: a CLIP for images, and a multilingual text model distilled into its space.

Examples are clip-ViT-B-32 and clip-ViT-B-32-multilingual-v1. They need the extra `peers`.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.hub import cached_file

from koclip.config import ConfigError, check
from koclip.encoders.base import TwoModels, fingerprint, tokenizer_rules
from koclip.encoders.transformers import DUAL_ENCODERS, TransformersEncoder
from koclip.models.pretrained import read, refuse, unreadable

FORM = "sentence_transformers:<text model>+<image model>"


def open_spec(spec: str, device: torch.device) -> TwoModels:
    """Open the two models that `FORM` describes.

    Raises:
        ConfigError: the spec has another form, a model cannot be loaded, or sentence-transformers is not installed.
    """
    texts, images = two_paths(spec, FORM)
    return TwoModels(SentenceTexts(texts, device), SentenceImages(images, device), spec)


def two_paths(spec: str, form: str) -> tuple[str, str]:
    """Return the paths of the text model and the image model in a spec `<library>:<text model>+<image model>`."""
    texts, _, images = spec.partition(":")[2].partition("+")
    check(bool(texts and images), "model", spec, f"expected {form}")
    return texts, images


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"model: {name} is not installed ({error}): pip install 'koclip[peers]'") from error


class SentenceTexts:
    """A text model of sentence-transformers that was distilled into a CLIP's space; `path` is a directory or Hub id."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.model = _sentence_transformer(path, device)
        self.tokenizer = self.model.tokenizer

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings (B, D)."""
        return _encode(self.model, texts)

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, and the tokenizer."""
        return fingerprint(self.model[0].auto_model, self.model, repr(self.model), tokenizer_rules(self.tokenizer))


class SentenceImages(TransformersEncoder):
    """The image side of a CLIP of sentence-transformers; `path` is a directory or Hub id.

    Raises:
        ConfigError: the model is not a CLIP.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self._sentence_model = _sentence_transformer(path, device)
        clip: Any = getattr(self._sentence_model[0], "auto_model", None)
        check(isinstance(clip, DUAL_ENCODERS), "model", path, f"a {type(clip).__name__}: expected a CLIP for images")
        super().__init__(clip, self._sentence_model[0].processor, path)

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, and the image processor."""
        return fingerprint(super().fingerprint(), self._sentence_model, repr(self._sentence_model))

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return _encode(self._sentence_model, images)


def _sentence_transformer(path: str, device: torch.device) -> Any:
    library = package("sentence_transformers")
    expected = "modules.json, model.safetensors and the rest of a sentence-transformers model"
    try:
        # Without this file, the library adds mean pooling to any model.
        modules = json.loads(Path(str(cached_file(path, "modules.json"))).read_text())
        options = {"use_safetensors": True, "dtype": torch.float32}
        model = library.SentenceTransformer(path, device=str(device), trust_remote_code=False, model_kwargs=options)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise unreadable(path, "model", expected, error) from error
    # The library gives missing weights random values without an error.
    first, problems = read(path, "model", modules[0]["path"])
    refuse(path, "model", first, {fault: names for fault, names in problems.items() if fault != "unexpected_keys"})
    return model.eval()


def _encode(model: Any, items: list[Any]) -> torch.Tensor:
    embeddings: torch.Tensor = model.encode(
        items, batch_size=len(items), convert_to_tensor=True, show_progress_bar=False
    )
    return embeddings
