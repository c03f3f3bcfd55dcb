"""The two sides of sentence-transformers: multilingual texts that were distilled into the space of a CLIP's images.

As clip-ViT-B-32-multilingual-v1 and clip-ViT-B-32. They need the extra `peers`.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.hub import cached_file

from koclip.config import ConfigError, check
from koclip.data.transforms import to_rgb
from koclip.encoders.base import (
    DUAL_ENCODERS,
    TransformersEncoder,
    evaluating,
    tokenizer_rules,
    unit,
    unknown_share,
)
from koclip.encoders.fingerprint import fingerprint
from koclip.models.pretrained import read, refuse, unreadable


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
    """A text model of sentence-transformers that was distilled into a CLIP's space.

    Args:
        path: Directory or Hub id.
        device: Where to put the model.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self._model = _sentence_transformer(path, device)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""
        return _sentences(self._model, list(texts))

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self._model.tokenizer, texts)

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, and the tokenizer."""
        return fingerprint(
            self._model[0].auto_model, self._model, repr(self._model), tokenizer_rules(self._model.tokenizer)
        )


class SentenceImages:
    """A CLIP of sentence-transformers, for its images.

    Args:
        path: Directory or Hub id.
        device: Where to put the model.

    Raises:
        ConfigError: it is no CLIP.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self._model = _sentence_transformer(path, device)
        clip: Any = getattr(self._model[0], "auto_model", None)
        check(isinstance(clip, DUAL_ENCODERS), "model", path, f"a {type(clip).__name__}: expected a CLIP for images")
        self._clip = TransformersEncoder(clip, self._model[0].processor, path)
        self.image_features = self._clip.image_features

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax: the CLIP's."""
        return self._clip.scale

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""
        return _sentences(self._model, [to_rgb(image) for image in images])

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, and the image processor."""
        return fingerprint(self._clip.fingerprint(), self._model, repr(self._model))


def _sentence_transformer(path: str, device: torch.device) -> Any:
    library = package("sentence_transformers")
    expected = "modules.json, model.safetensors and the rest of a sentence-transformers model"
    try:
        # Without this file the library builds a model of its own: mean pooling over whatever is there.
        modules = json.loads(Path(str(cached_file(path, "modules.json"))).read_text())
        options = {"use_safetensors": True, "dtype": torch.float32}
        model = library.SentenceTransformer(path, device=str(device), trust_remote_code=False, model_kwargs=options)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise unreadable(path, "model", expected, error) from error
    # The library says nothing of weights that are missing, which it draws at random.
    first, problems = read(path, "model", modules[0]["path"])
    refuse(path, "model", first, {fault: names for fault, names in problems.items() if fault != "unexpected_keys"})
    return model.eval()


def _sentences(model: Any, items: list[Any]) -> torch.Tensor:
    with evaluating(model):
        return unit(model.encode(items, batch_size=len(items), convert_to_tensor=True, show_progress_bar=False))
