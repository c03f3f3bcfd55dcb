"""Embed the patches of an image beside the whole, so that a text can be compared with each of them."""

from typing import Any

import torch
import torch.nn.functional as F


class NoPatchesError(ValueError):
    """The model's image tower has no patches that its projection could read."""


def patch_embeddings(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the unit-norm embeddings (B, R, C, D) of the R x C patches of images (B, 3, H, W), on the CPU.

    A ViT's image embedding is W f(h_0) of its class token's last hidden state h_0, where f is CLIP's post layer norm
    (or the pooler of google/vit-*) and W the projection. The same is read here from every patch's state:

        e_p = W f(h_p) / |W f(h_p)|,    score of a text t for patch p = <e_p, t>

    Training never asked this of patches: they pass through the same layers and mostly end where the class token does,
    but an answer shows where the tower gathered what is asked for, which need not be where it lies (Zhou et al. 2022,
    MaskCLIP, section 3; Li et al. 2023, CLIP Surgery).

    Raises:
        NoPatchesError: the tower is a ResNet, pools by attention, or is otherwise not read like this.
    """
    tower, project = model.vision_model, getattr(model, "visual_projection", None)
    size = getattr(tower.config, "patch_size", None)
    if project is None or not isinstance(size, int):
        raise NoPatchesError(f"a {type(tower).__name__} has no patches to compare with a text")
    hidden = tower(pixel_values=pixel_values).last_hidden_state  # (B, T, W)
    rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
    if hidden.ndim != 3 or hidden.shape[1] < rows * columns:
        raise NoPatchesError(f"a {type(tower).__name__} has no state per patch")
    patches = hidden[:, hidden.shape[1] - rows * columns :]  # class and register tokens come first
    if hasattr(tower, "post_layernorm"):
        patches = tower.post_layernorm(patches)
    elif hasattr(getattr(tower, "pooler", None), "dense"):
        patches = tower.pooler.activation(tower.pooler.dense(patches))
    else:
        raise NoPatchesError(f"how a {type(tower).__name__} makes its embedding from a state is not known")
    grid: torch.Tensor = F.normalize(project(patches).float(), dim=-1).unflatten(1, (rows, columns))
    return grid.cpu()
