"""The dual encoder: random weights, or a pretrained model with another text encoder or with adapters."""

from dataclasses import dataclass
from typing import Literal

from koclip.config.checks import all_faults, check


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dual encoder. A preset gives every size; the other keys override it.

    Args:
        preset: `tiny`, `small`, a size of the CLIP paper (`vit_b32`, `vit_b16`, `vit_l14`, `vit_l14_336`, `rn50`,
            `rn101`, `rn50x4`, `rn50x16`, `rn50x64`), or another image tower with random weights:
            `timm:<architecture>`, or `auto:<directory or Hub id>` of a configuration for transformers' AutoModel.
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels; image_size must be a multiple.
        image_width: Width of the image tower.
        image_layers: Depth of the image tower.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        embed_dim: Width of the shared space.
        temperature: Initial temperature of the contrastive loss (the paper's 0.07).
        patch_dropout: Share of the image patches dropped in training (FLIP, Li et al. 2023).
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: Likewise for the text tower.
        seed: Seed of the initial weights.
    """

    preset: str = "tiny"
    image_size: int | None = None
    patch_size: int | None = None
    image_width: int | None = None
    image_layers: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    embed_dim: int | None = None
    temperature: float = 0.07
    patch_dropout: float = 0.0
    image_gradient_checkpointing: bool = False
    text_gradient_checkpointing: bool = False
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        # exp(logit_scale) is clamped to 100, so a temperature below 0.01 could not be kept.
        check(0.01 <= self.temperature <= 1, "model.temperature", self.temperature, "expected 0.01 to 1")
        check(0 <= self.patch_dropout < 1, "model.patch_dropout", self.patch_dropout, "expected 0 or more, less than 1")
        for name in (
            "image_size",
            "patch_size",
            "image_width",
            "image_layers",
            "text_width",
            "text_layers",
            "embed_dim",
        ):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name}", value, "expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """The source dual encoder, and its new text encoder.

    Args:
        clip: Directory or Hub id of a CLIP, or of an image tower such as `google/vit-large-patch16-224`. Its image
            embeddings stay the same. From a SigLIP, only the image tower is taken.
        text_encoder: Directory or Hub id of a text encoder with its tokenizer. `auto:<directory or Hub id>`: random
            weights of that configuration, with the tokenizer there. `same`: keep the text encoder of `clip`.
            Default: a CLIP text transformer of the sizes below with random weights.
        text_width: Width of a new text transformer. Default: the source's.
        text_layers: Depth of a new text transformer. Default: the source's.
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: Likewise for the text tower.
        seed: Seed of the new weights.
    """

    clip: str = ""
    text_encoder: str | None = None
    text_width: int | None = None
    text_layers: int | None = None
    image_gradient_checkpointing: bool = False
    text_gradient_checkpointing: bool = False
    seed: int = 0

    @all_faults()
    def __post_init__(self) -> None:
        named = "name the directory or Hub id of a CLIP or an image tower"
        check(bool(self.clip), "model.clip", self.clip, named)
        for name in ("text_width", "text_layers"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name}", value, "expected 1 or more")
            check(value is None or self.text_encoder is None, f"model.{name}", value, "model.text_encoder has its own")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA (Hu et al. 2022) on the attention and MLP layers, for `align.method: lora`.

    Args:
        target: Tower with adapters: `text`, `image` or `both`. A new text projection is always trained.
        rank: Rank of the adapters.
        alpha: Adapters are scaled by alpha / rank.
        dropout: Dropout probability at the input of the adapters.
        dora: Learn magnitude and direction separately (DoRA, Liu et al. 2024).
    """

    target: Literal["text", "image", "both"] = "text"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    dora: bool = False

    @all_faults()
    def __post_init__(self) -> None:
        check(self.rank >= 1, "lora.rank", self.rank, "expected 1 or more")
        check(self.alpha >= 1, "lora.alpha", self.alpha, "expected 1 or more")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "expected 0 or more and less than 1")
