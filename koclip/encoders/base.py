"""Encoders of images and texts behind one seam, so that one evaluation ranks any dual encoder by its own rules."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AltCLIPModel,
    ChineseCLIPModel,
    CLIPModel,
    MetaClip2Model,
    PreTrainedModel,
    ProcessorMixin,
    Siglip2Model,
    SiglipModel,
    VisionTextDualEncoderModel,
)

from koclip import distributed
from koclip.data.transforms import to_rgb
from koclip.encoders.fingerprint import fingerprint
from koclip.encoders.patches import patch_embeddings
from koclip.models.stock import longest_text

Item = TypeVar("Item")

DUAL_ENCODERS = (
    CLIPModel,
    ChineseCLIPModel,
    AltCLIPModel,
    SiglipModel,
    Siglip2Model,
    MetaClip2Model,
    VisionTextDualEncoderModel,
)
SIGLIP_TOKENS = 64  # SigLIP and SigLIP 2 were trained on texts padded to this length, without a mask
_NO_LIMIT = 10**9  # tokens; a tokenizer without a longest length says 10^30
_PROGRESS_FROM = 10  # batches; shorter work shows no bar


class Encoder(Protocol):
    """Embeds one batch at a time. B images or texts, D wide, W wide before the projection."""

    name: str

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax: the model's own logit scale."""

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU, by the model's own rules for text."""

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return float32 features (B, W) of the layer before the projection, on the CPU; linear probes read them."""

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""

    def fingerprint(self) -> str:
        """Return a hash of all that its embeddings depend on."""


class TransformersEncoder:
    """A dual encoder of transformers.

    Args:
        model: One of `DUAL_ENCODERS`; stays on the device and in the mode it is in.
        processor: Its own.
        name: Where it came from.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str = "") -> None:
        self.name = name
        self._model: Any = model
        self._processor: Any = processor
        self._is_siglip = model.config.model_type.startswith("siglip")

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU."""
        pixels = self._pixels(images)
        with evaluating(self._model):
            return unit(self._model.get_image_features(**pixels).pooler_output)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit-norm float32 embeddings (B, D), on the CPU; for SigLIP lower-cased and padded to 64 tokens."""
        tokenizer = self._processor.tokenizer
        if self._is_siglip:
            options = {"padding": "max_length", "truncation": True, "max_length": SIGLIP_TOKENS}
            encoded = tokenizer(self._cased(texts), return_tensors="pt", **options)
            wanted = ["input_ids"]
        else:
            encoded = encode(tokenizer, texts, self._model.text_model)
            wanted = ["input_ids", "attention_mask"]
        inputs = {name: encoded[name].to(self._model.device) for name in wanted}
        with evaluating(self._model):
            return unit(self._model.get_text_features(**inputs).pooler_output)

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the image tower's pooled output (B, W), on the CPU: what the projection reads where there is one."""
        pixels = self._pixels(images)
        with evaluating(self._model):
            features: torch.Tensor = self._model.vision_model(**pixels).pooler_output
        return features.float().cpu()

    def patches(self, image: Image.Image) -> torch.Tensor:
        """Return the unit-norm embeddings (R, C, D) of an image's patches, as it is cut out for the tower.

        Raises:
            NoPatchesError: the image tower has none (`koclip.encoders.patches`).
        """
        pixels = self._pixels([image])
        with evaluating(self._model):
            return patch_embeddings(self._model, pixels["pixel_values"])[0]

    @property
    def view(self) -> tuple[float, float] | None:
        """Width and height of what is seen of an image, as shares of its shorter side; None: all of it, squashed."""
        processor = self._processor.image_processor
        if not getattr(processor, "do_center_crop", False) or not processor.size.get("shortest_edge"):
            return None
        shortest, crop = processor.size["shortest_edge"], processor.crop_size
        return crop["width"] / shortest, crop["height"] / shortest

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax."""
        return float(self._model.logit_scale.detach().exp())

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return the share of tokens that are the tokenizer's unknown token, 0 to 1."""
        return unknown_share(self._processor.tokenizer, self._cased(texts))

    def fingerprint(self) -> str:
        """Return a hash of the weights, their configuration, the tokenizer and the image processor."""
        rules = repr(self._processor.image_processor), tokenizer_rules(self._processor.tokenizer)
        return fingerprint(self._model, self._model.config.model_type, *rules)

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() if self._is_siglip else text for text in texts]

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        # Not by the processor: SigLIP 2's puts its own patch size and number over those that the checkpoint saved.
        inputs = self._processor.image_processor([to_rgb(image) for image in images], return_tensors="pt")
        moved = {name: value.to(self._model.device) for name, value in inputs.items()}
        return moved | {"pixel_values": moved["pixel_values"].to(self._model.dtype)}


def encode(tokenizer: Any, texts: Sequence[str], text_tower: nn.Module) -> Any:
    """Tokenize texts, padded to the longest and cut to what both the tokenizer and the tower's positions take."""
    longest = longest_text(tokenizer, text_tower)
    cut = {"truncation": True, "max_length": longest} if longest < _NO_LIMIT else {}
    return tokenizer(list(texts), padding=True, return_attention_mask=True, return_tensors="pt", **cut)


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the share of the tokens of `texts` that are the unknown token of a tokenizer of transformers.

    CLIP's unknown token is its end token, so a text that spells it out is split: it names no unknown token.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = [one for text in texts for one in tokenizer(text, **options)["input_ids"]]
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))


def tokenizer_rules(tokenizer: Any) -> str:
    """Return all that a tokenizer of transformers makes ids by, but for where it lies and what calls left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pieces = getattr(tokenizer, "sp_model", None)
        rules: Any = [tokenizer.get_vocab(), pieces.serialized_model_proto().hex() if pieces else None]
        rules.append(getattr(tokenizer, "do_lower_case", None))
    else:
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    sides = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length
    return json.dumps([type(tokenizer).__name__, rules, sides, tokenizer.special_tokens_map], default=str)


def in_batches(
    embed: Callable[[list[Item]], torch.Tensor],
    items: Sequence[Item],
    batch_size: int,
    unit: str,
    order: Sequence[int] | None = None,
    spread: bool = False,
) -> torch.Tensor:
    """Embed items batch by batch and return their rows (N, ...) in the items' order. There is at least one item.

    Args:
        embed: Takes one batch.
        items: N of them.
        batch_size: Items per batch.
        unit: What the progress bar calls them.
        order: The order in which they fill batches; default: their own.
        spread: Share the batches among the processes. They are the same batches, so the rows are the same bits.
    """
    order = range(len(items)) if order is None else order
    batches = [order[start : start + batch_size] for start in range(0, len(items), batch_size)]
    rank, world_size = (distributed.rank(), distributed.world_size()) if spread else (0, 1)
    quiet = len(batches) < _PROGRESS_FROM or rank > 0
    mine = len(batches[rank::world_size])
    with tqdm(desc=f"embedding {unit}", total=mine, leave=False, disable=quiet) as bar:

        def embed_batch(batch: Sequence[int]) -> torch.Tensor:
            made = embed([items[place] for place in batch])
            bar.update()
            return made

        rows = torch.cat(distributed.share(embed_batch, batches) if spread else [embed_batch(one) for one in batches])
    return rows[torch.tensor(order).argsort()]


def by_length(texts: Sequence[str]) -> list[int]:
    """Return the places of texts from the shortest to the longest, so that batches hold little padding."""
    return sorted(range(len(texts)), key=lambda place: len(texts[place]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in the mode it was in: a frozen tower's is not the model's."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def unit(features: torch.Tensor) -> torch.Tensor:
    """Return features (B, D) in float32, of norm 1, on the CPU."""
    return F.normalize(features.float(), dim=-1).cpu()
