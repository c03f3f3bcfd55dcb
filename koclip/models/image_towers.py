"""Image towers other than CLIP's own ViT: whatever timm or transformers' AutoModel builds, from random weights."""

from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModel, TimmWrapperConfig

from koclip.config import ConfigError, check

DEFAULT_IMAGE_SIZE = 224  # pixels; for towers whose configuration names none


def tower_config(image_tower: str, image_size: int) -> tuple[Any, int]:
    """Return a tower's stock configuration and the image size it takes, pixels.

    The joint class sizes its projection by `hidden_size`. Some configurations lack it, and the pooled output of others
    is wider: it is set to the width that a forward pass gives. (The pass runs on the meta device, it costs nothing.)

    Args:
        image_tower: `timm:<architecture>` or `auto:<path or Hub id>`.
        image_size: Side of the square input, pixels; 0 takes the tower's own.

    Raises:
        ConfigError: there is no such tower, or it has no pooled output, or does not take images of this size.
    """
    kind, name = image_tower.split(":", 1)
    config = _timm_config(name) if kind == "timm" else _auto_config(name)
    own_size = _image_size(config)
    if image_size and image_size != own_size:
        _resize(config, image_size)
    size = image_size or own_size
    config.hidden_size = _pooled_width(config, image_tower, size)
    return config, size


def _timm_config(architecture: str) -> TimmWrapperConfig:
    similar = timm.list_models(f"*{architecture.split('_')[0]}*")[:5]
    check(
        timm.is_model(architecture), "model.preset", f"timm:{architecture}", f"no such architecture; close: {similar}"
    )
    return TimmWrapperConfig(architecture=architecture)


def _auto_config(path: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.preset: auto:{path} cannot be read: {str(error).splitlines()[0]}") from error
    return getattr(config, "vision_config", config)  # of CLIP, SigLIP and the like: their image tower


def _image_size(config: Any) -> int:
    if isinstance(config, TimmWrapperConfig):
        known = timm.get_pretrained_cfg(config.architecture)
        return int(known.input_size[-1]) if known else DEFAULT_IMAGE_SIZE
    size = getattr(config, "image_size", DEFAULT_IMAGE_SIZE)
    return int(size if isinstance(size, int) else size[0])


def _resize(config: Any, image_size: int) -> None:
    """Size the position embeddings for `image_size`; convolutional towers have none and take any size."""
    if isinstance(config, TimmWrapperConfig):
        if _timm_takes_size(config, image_size):
            config.model_args = {**(config.model_args or {}), "img_size": image_size}
    elif hasattr(config, "image_size"):
        config.image_size = image_size


def _timm_takes_size(config: TimmWrapperConfig, image_size: int) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(config.architecture, **{**(config.model_args or {}), "img_size": image_size})
    except TypeError:  # an unexpected keyword argument
        return False
    return True


def _pooled_width(config: Any, name: str, image_size: int) -> int:
    """Return D of a tower's pooled output (B, D)."""
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(config).eval()
            pooled = tower(pixel_values=torch.zeros(1, 3, image_size, image_size)).pooler_output
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.preset: {name} does not embed {image_size} pixel images: {error}") from error
    fits = pooled is not None and pooled.ndim == 2
    check(fits, "model.preset", name, "expected an image tower with a pooled output (B, D); take another")
    return int(pooled.shape[-1])
