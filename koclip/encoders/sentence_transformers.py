"""Models of sentence-transformers that embed images and texts. They need the extra `peers`.

Either a model for both, such as a `Router` of two towers or a CLIP; or two models: a CLIP for images, and a
multilingual text model distilled into its space, such as clip-ViT-B-32 and clip-ViT-B-32-multilingual-v1.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from koclip.config import check, peer
from koclip.encoders.base import Encoder, Processor, TwoModels, fingerprint, tokenizer_rules, unknown_share
from koclip.encoders.transformers import DUAL_ENCODERS, TransformersEncoder
from koclip.models.pretrained import read, refuse, unreadable
from koclip.models.router import FILE as ROUTER
from koclip.models.router import read_json

_TWO = "sentence_transformers:<text model>+<image model>"
FORM = f"sentence_transformers:<model>, {_TWO}"


def open_spec(spec: str, device: torch.device) -> Encoder:
    """Open the model, or the two models, that `FORM` describes.

    Raises:
        ConfigError: the spec has another form, a model cannot be loaded or embeds no images, or sentence-transformers
            is not installed.
    """
    path = spec.partition(":")[2]
    if path and "+" not in path:
        return SentenceEncoder(path, device, spec)
    texts, images = two_paths(spec, _TWO)
    return TwoModels(SentenceTexts(texts, device), SentenceImages(images, device), spec)


def two_paths(spec: str, form: str) -> tuple[str, str]:
    """Return the paths of the text model and the image model in a spec `<library>:<text model>+<image model>`."""
    texts, _, images = spec.partition(":")[2].partition("+")
    check(bool(texts and images), "model", spec, f"expected {form}")
    return texts, images


class SentenceEncoder(Encoder):
    """A model of sentence-transformers that embeds images and texts; `path` is a directory or Hub id.

    Raises:
        ConfigError: the model cannot be loaded, or embeds no images or no texts alone.
    """

    def __init__(self, path: str, device: torch.device, name: str = "") -> None:
        model = _sentence_transformer(path, device)
        inputs = {modality: _input_module(model, modality) for modality in ("image", "text")}
        missing = [modality for modality, module in inputs.items() if module is None]
        fix = f"expected {' and '.join(missing)}, too: name a model for images as well, {_TWO}"
        check(not missing, f"model: {name}, modalities", list(model.modalities), fix)
        images = inputs["image"].processor
        super().__init__(model, Processor(getattr(images, "image_processor", images), inputs["text"].tokenizer), name)
        self._network: Any = inputs["image"].auto_model

    @property
    def scale(self) -> float:
        """The factor of the cosines: that of a CLIP, else 1.0, because sentence-transformers stores none."""
        scale = getattr(self._network, "logit_scale", None)
        return 1.0 if scale is None else float(scale.detach().exp())

    @property
    def bias(self) -> float:
        """The bias of a SigLIP, else 0.0."""
        bias = getattr(self._network, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self.processor.tokenizer, texts)

    def fingerprint(self) -> str:
        """Return a hash of the weights, the modules with their settings, and the preprocessing."""
        settings = repr(self.model), json.dumps(self.model.prompts), str(self.model.default_prompt_name)
        rules = tokenizer_rules(self.processor.tokenizer), repr(self.processor.image_processor)
        return fingerprint(self.model, *settings, *rules)

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return _encode(self.model, images)

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        """The model adds its default prompt, if it has one."""
        return _encode(self.model, texts)

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """The embeddings: the library does not say which module is the projection."""
        return _encode(self.model, images)


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

    def image_fingerprint(self) -> str:
        """Return the hash of the whole model, whose modules embed the images."""
        return self.fingerprint()

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return _encode(self._sentence_model, images)


def _sentence_transformer(path: str, device: torch.device) -> Any:
    library = peer("sentence_transformers", "model")
    expected = "modules.json, model.safetensors and the rest of a sentence-transformers model"
    try:
        # Without this file, the library adds mean pooling to any model.
        modules = read_json(path, "modules.json")
        options = {"use_safetensors": True, "dtype": torch.float32}
        model = library.SentenceTransformer(path, device=str(device), trust_remote_code=False, model_kwargs=options)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise unreadable(path, "model", expected, error) from error
    for folder in _towers(path, modules):  # the library gives missing weights random values without an error
        tower, problems = read(path, "model", folder)
        refuse(path, "model", tower, {fault: names for fault, names in problems.items() if fault != "unexpected_keys"})
    return model.eval()


def _towers(path: str, modules: list[dict[str, Any]]) -> list[str]:
    """Return the folders of the models of transformers in a model of sentence-transformers; "" is the root."""
    types = {module["path"]: module["type"] for module in modules}
    if modules[0]["type"].endswith(".Router"):
        folder = modules[0]["path"]
        routed = read_json(path, ROUTER, folder)["types"]
        types = {f"{folder}/{name}".strip("/"): kind for name, kind in routed.items()}
    return [folder for folder, kind in types.items() if kind.endswith((".Transformer", ".CLIPModel"))]


def _input_module(model: Any, modality: str) -> Any:
    """Return the module that gets images or texts, which has their preprocessing; None if there is none."""
    routes = getattr(model[0], "sub_modules", None)
    modules = [model[0]] if routes is None else [route[0] for route in routes.values()]
    return next((module for module in modules if modality in getattr(module, "modalities", ["text"])), None)


def _encode(model: Any, items: list[Any]) -> torch.Tensor:
    embeddings: torch.Tensor = model.encode(
        items, batch_size=len(items), convert_to_tensor=True, show_progress_bar=False
    )
    return embeddings
