"""The dual encoder and its loss."""

from dataclasses import dataclass
from typing import Literal

from koclip.config.errors import all_faults, check


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dual encoder. A preset gives every size; the other keys override it.

    Args:
        preset: `tiny`, `small`, the paper's `vit_b32`, `vit_b16`, `vit_l14`, `vit_l14_336`, `rn50`, `rn101`,
            `rn50x4`, `rn50x16`, `rn50x64`, or another image tower, from random weights too: `timm:<architecture>`, or
            `auto:<path or Hub id>` of a configuration that transformers' AutoModel builds.
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels; image_size must be a multiple.
        image_width: Width of the image tower.
        image_layers: Depth of the image tower.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        embed_dim: Width of the shared space.
        temperature: Initial temperature of the contrastive loss (the paper's 0.07).
        patch_dropout: Share of the patches that the ViT does not see in training (FLIP, Li et al. 2023).
        image_gradient_checkpointing: Recompute the image tower's activations in the backward pass.
        text_gradient_checkpointing: The same for the text tower.
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
class LossConfig:
    """The contrastive loss.

    Args:
        name: `infonce` (CLIP), `sigmoid` (SigLIP), or another loss of `koclip.losses.CONTRASTIVE`.
        duplicates: What two pairs of a batch with the same caption or the same image count as: `positives`, `negatives`
            (as in the CLIP paper), or `masked` (neither).
        tile_rows: Rows of the similarity matrix (batch_size x global batch) in memory at a time. It changes the memory,
            not the result. Default: as many as fit into 4 MiB on a CPU, 256 MiB on a GPU, but at least 64.
    """

    name: str = "infonce"
    duplicates: Literal["positives", "masked", "negatives"] = "positives"
    tile_rows: int | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check(self.tile_rows is None or self.tile_rows >= 1, "loss.tile_rows", self.tile_rows, "expected 1 or more")
