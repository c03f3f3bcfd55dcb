"""Train on part of the patches (FLIP, Li et al. 2023): faster steps, and a regulariser on small data."""

from functools import partial

import torch
from torch import nn


def drop_patches(vision_model: nn.Module, share: float) -> None:
    """Make a CLIP ViT see a random part of the patches in training mode; evaluation sees them all.

    Args:
        vision_model: A `CLIPVisionModel`. A forward hook is added to its embeddings; its weights stay as they are.
        share: Share of the patches left out, 0 to 1; at least one patch stays. The class token always stays.
    """
    vision_model.get_submodule("embeddings").register_forward_hook(partial(_keep_some, share))


def _keep_some(share: float, module: nn.Module, _: object, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the class token and a random subset of the patches, (B, 1 + kept, D), each image its own."""
    if not module.training:
        return None
    batch, length, width = tokens.shape
    kept = max(1, round((length - 1) * (1 - share)))
    chosen = torch.rand(batch, length - 1, device=tokens.device).argsort(dim=1)[:, :kept] + 1
    with_class = torch.cat([chosen.new_zeros(batch, 1), chosen], dim=1)
    return tokens.gather(1, with_class[..., None].expand(-1, -1, width))
