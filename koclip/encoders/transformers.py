"""Dual encoders of transformers: CLIP, ChineseCLIP, AltCLIP, SigLIP, SigLIP 2, MetaCLIP 2, VisionTextDualEncoder."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Siglip2Model

from koclip.config import check
from koclip.data.transforms import to_rgb
from koclip.encoders.base import Encoder, NoPatchesError, evaluating, fingerprint, tokenizer_rules, unknown_share
from koclip.models.pretrained import read, read_processor, refuse
from koclip.models.stock import LAYOUTS, bias_of, layout_of, longest_text
from koclip.text.normalize import normalize
from koclip.text.prefix import prefix_of
from koclip.text.tokenizers import LEGACY_EOS_ID

DUAL_ENCODERS = (*(layout.model_class for layout in LAYOUTS), Siglip2Model)
SIGLIP_TOKENS = 64  # SigLIP and SigLIP 2 were trained on texts padded to this length, without a mask
_ANY_TEXT = "a"
_NO_LIMIT = 10**9  # tokens; `model_max_length` is 10^30 in a tokenizer without a limit

FORM = "a directory, a Hub id"


class TransformersEncoder(Encoder):
    """A dual encoder of transformers: an instance of a class in `DUAL_ENCODERS`, and its processor."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str = "") -> None:
        super().__init__(model, processor, name)
        self._is_siglip = model.config.model_type.startswith("siglip")

    @property
    def bias(self) -> float:
        """The model's bias (SigLIP), else `logit_bias` of its config.json (koclip's models), else 0.0."""
        return bias_of(self.model) or 0.0

    @property
    def view(self) -> tuple[float, float] | None:
        """Width and height of the centre crop that the model sees, as shares of the shorter side. None: no crop."""
        processor = self.processor.image_processor
        if not getattr(processor, "do_center_crop", False) or not processor.size.get("shortest_edge"):
            return None
        shortest, crop = processor.size["shortest_edge"], processor.crop_size
        return crop["width"] / shortest, crop["height"] / shortest

    def patches(self, image: Image.Image) -> torch.Tensor:
        """Return the unit-norm embeddings (R, C, D) of the patches of the cropped image, on the CPU.

        Raises:
            NoPatchesError: see `patch_embeddings`.
        """
        pixels = self._pixels([to_rgb(image)])
        with evaluating(self.model):
            return patch_embeddings(self.model, pixels["pixel_values"])[0]

    def token_vectors(self, text: str) -> torch.Tensor:
        """Return the token embeddings (M, E) of a text without special tokens, in float32, on the model's device.

        The tokenizer's prefix, if it has one, is not among them: `texts_behind` keeps it.
        """
        start, end = self._ends
        ids = self._tokens([normalize(text)])["input_ids"][0]
        if self._is_siglip:  # padded
            ids = ids[: len(self.processor.tokenizer(self._cased([text])[0])["input_ids"])]
        with torch.no_grad():
            vectors: torch.Tensor = self._embedding(ids[start : len(ids) - end])
        return vectors.float()

    def texts_behind(self, context: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Return unit-norm embeddings (B, D) of texts that begin with M vectors instead of words, in one batch.

        `context` (M, E) takes the places before each text's first token, after a start token and a prefix. Gradients
        reach the context if autograd records it. Zhou et al. 2022 (CoOp).

        Raises:
            ConfigError: the text tower has too few positions for the context.
        """
        (start, _), count = self._ends, len(context)
        longest = SIGLIP_TOKENS if self._is_siglip else longest_text(self.processor.tokenizer, self.model.text_model)
        places = longest - sum(self._ends) - 1
        check(count <= places, "context, tokens", count, f"expected at most {places}, the places of {self.name}")
        inputs = self._tokens([f" {normalize(text)}" for text in texts], reserved=count)  # a space: they follow words
        inputs = {name: _widened(values, start, count) for name, values in inputs.items()}

        def replace(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
            learned = context.to(embedded).expand(len(embedded), -1, -1)
            return torch.cat([embedded[:, :start], learned, embedded[:, start + count :]], dim=1)

        handle = self._embedding.register_forward_hook(replace)
        try:
            return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
        finally:
            handle.remove()

    @property
    def token_deviation(self) -> float:
        """The standard deviation of the values of all token embeddings: how large a step of `context` is."""
        return float(self._embedding.weight.detach().std())

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.text_model.get_input_embeddings()
        return embedding

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """The numbers of tokens that the tokenizer puts before every text (special tokens, a prefix) and after it."""
        tokenizer = self.processor.tokenizer
        special = tokenizer(_ANY_TEXT, return_special_tokens_mask=True)["special_tokens_mask"]
        first, last = special.index(0), special[::-1].index(0)
        prefix = prefix_of(tokenizer) if hasattr(tokenizer, "backend_tokenizer") else ""
        lengths = [len(tokenizer(text)["input_ids"]) for text in (_ANY_TEXT, prefix + _ANY_TEXT)]
        return first + lengths[1] - lengths[0], last

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self.processor.tokenizer, self._cased(texts))

    def fingerprint(self) -> str:
        """Return a hash of the weights, their configuration, the tokenizer and the image processor."""
        rules = repr(self.processor.image_processor), tokenizer_rules(self.processor.tokenizer)
        return fingerprint(self.model, self.model.config.model_type, *rules)

    def image_fingerprint(self) -> str:
        """Return a hash of the image tower, its projection and the image processor: models may share these."""
        known = isinstance(self.model, tuple(layout.model_class for layout in LAYOUTS))  # not SigLIP 2's NaFlex
        if not known:
            return self.fingerprint()
        modules = [self.model.get_submodule(name) for name in layout_of(self.model).image_side]
        return fingerprint(*modules, self.model.config.model_type, repr(self.processor.image_processor))

    def _embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        features: torch.Tensor = self.model.get_image_features(**self._pixels(images)).pooler_output
        return features

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        features: torch.Tensor = self.model.get_text_features(**self._tokens(texts)).pooler_output
        return features

    def _tokens(self, texts: Sequence[str], reserved: int = 0) -> dict[str, torch.Tensor]:
        """Return the model's inputs, (B, L) each; texts are cut so that `reserved` more tokens have a place.

        Texts for SigLIP are in lower case and padded to 64 tokens.
        """
        tokenizer = self.processor.tokenizer
        if self._is_siglip:
            options = {"padding": "max_length", "truncation": True, "max_length": SIGLIP_TOKENS - reserved}
            encoded = tokenizer(self._cased(texts), return_tensors="pt", **options)
            names = ["input_ids"]
        else:
            encoded = encode(tokenizer, texts, self.model.text_model, reserved)
            names = ["input_ids", "attention_mask"]
        return {name: encoded[name].to(self.model.device) for name in names}

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        features: torch.Tensor = self.model.vision_model(**self._pixels(images)).pooler_output
        return features

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() if self._is_siglip else text for text in texts]

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        # SigLIP 2's processor would replace the checkpoint's patch size and number of patches by its own defaults.
        inputs = self.processor.image_processor(images, return_tensors="pt")
        moved = {name: value.to(self.model.device) for name, value in inputs.items()}
        return moved | {"pixel_values": moved["pixel_values"].to(self.model.dtype)}


def open_spec(spec: str, device: torch.device) -> TransformersEncoder:
    """Open a directory or Hub id, in fp32 and evaluation mode.

    Raises:
        ConfigError: the model cannot be loaded, has missing or unexpected weights, or is not a dual encoder.
    """
    folder = Path(spec)
    foreign = (folder / "modules.json").is_file() and not (folder / "config.json").exists()
    check(not foreign, "model", spec, f"expected sentence_transformers:{spec}, because that library saved it")
    model, problems = read(spec, "model")
    classes = ", ".join(kind.__name__ for kind in DUAL_ENCODERS)
    check(isinstance(model, DUAL_ENCODERS), "model", spec, f"a {type(model).__name__}: expected one of {classes}")
    refuse(spec, "model", model, problems)
    processor: Any = read_processor(spec, "model")
    _check_end(spec, model, processor.tokenizer)
    return TransformersEncoder(model.to(device), processor, spec)


def encode(tokenizer: Any, texts: Sequence[str], text_tower: nn.Module, reserved: int = 0) -> Any:
    """Tokenize texts, padded to the longest, cut to the limit of the tokenizer and of the tower's positions.

    `reserved` is a number of tokens of that limit to leave free.
    """
    longest = longest_text(tokenizer, text_tower) - reserved
    cut = {"truncation": True, "max_length": longest} if longest < _NO_LIMIT else {}
    return tokenizer(list(texts), padding=True, return_attention_mask=True, return_tensors="pt", **cut)


def _widened(values: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Repeat a column of token ids or of a mask (B, L), so that `count` more tokens have a place from `start` on."""
    return torch.cat([values[:, :start], values[:, start, None].expand(-1, count), values[:, start:]], dim=1)


def patch_embeddings(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the unit-norm embeddings (B, R, C, D) of the R x C patches of images (B, 3, H, W), on the CPU.

    A ViT's image embedding is W f(h_0), where h_0 is the last hidden state of the class token, f is CLIP's post layer
    norm (or the pooler of google/vit-*) and W is the projection. Here W f is applied to the state h_p of every patch:

        e_p = W f(h_p) / |W f(h_p)|,    score of a text t for patch p = <e_p, t>

    Training does not optimise these scores. They show where the tower collected information, which may not be where
    the object is (Zhou et al. 2022, MaskCLIP, section 3; Li et al. 2023, CLIP Surgery).

    Raises:
        NoPatchesError: the image tower is not a ViT that reads its class token, for example a ResNet.
    """
    tower, project = model.vision_model, getattr(model, "visual_projection", None)
    size = getattr(tower.config, "patch_size", None)
    if project is None or not isinstance(size, int):
        raise NoPatchesError(f"a {type(tower).__name__} has no patch embeddings to compare with a text")
    hidden = tower(pixel_values=pixel_values).last_hidden_state  # (B, T, W)
    rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
    if hidden.ndim != 3 or hidden.shape[1] < rows * columns:
        raise NoPatchesError(f"a {type(tower).__name__} has no hidden state per patch")
    patches = hidden[:, hidden.shape[1] - rows * columns :]  # class and register tokens come first
    if hasattr(tower, "post_layernorm"):
        patches = tower.post_layernorm(patches)
    elif hasattr(getattr(tower, "pooler", None), "dense"):
        patches = tower.pooler.activation(tower.pooler.dense(patches))
    else:
        raise NoPatchesError(f"a {type(tower).__name__} does not compute its embedding from a single hidden state")
    grid: torch.Tensor = F.normalize(project(patches).float(), dim=-1).unflatten(1, (rows, columns))
    return grid.cpu()


def _check_end(spec: str, model: Any, tokenizer: Any) -> None:
    """Check that the tokenizer adds the end token that CLIP and MetaCLIP 2 read; without it they read the first."""
    if model.config.model_type not in ("clip", "metaclip_2"):
        return
    end = model.config.text_config.eos_token_id
    ids = tokenizer("a picture")["input_ids"]
    oldest = model.config.model_type == "clip" and end == LEGACY_EOS_ID
    expected = f"expected the end token {end} of its config.json among them: use the tokenizer of its training"
    check(oldest or end in ids, f"model: {spec}, its tokenizer's ids of a text", ids, expected)
