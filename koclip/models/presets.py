"""Sizes and initial weights of the CLIP paper's models, of small models for a CPU, and of other image towers.

The paper's sizes are in Radford et al. 2021, tables 19 and 20. Other image towers are built by timm or by transformers'
AutoModel.

The ResNets are timm's ports of the paper's towers, with one difference: the output projection of the paper's attention
pool has a bias, but the stock class's `visual_projection` has none. So a model has `embed_dim` fewer parameters.
"""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, TimmWrapperConfig, TimmWrapperModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextEmbeddings, CLIPVisionEmbeddings

from koclip import installation
from koclip.config import ConfigError, ModelConfig, check
from koclip.models.stock import StockModel, parts

HEAD_WIDTH = 64  # of every tower in the paper
DEFAULT_IMAGE_SIZE = 224  # pixels; for towers whose configuration has no image size
RESNET_STRIDE = 32  # pixels per position of the attention pool


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All sizes of a dual encoder.

    `image_tower` is `vit`, `timm:<architecture>` or `auto:<path or Hub id>`. The last two set the tower's sizes; an
    image size of 0 is the tower's default.
    """

    image_tower: str = "vit"
    image_size: int
    patch_size: int = 0
    image_width: int = 0
    image_layers: int = 0
    text_width: int
    text_layers: int = 12
    embed_dim: int
    head_width: int = HEAD_WIDTH


def _vit(
    image: tuple[int, int, int, int], text: tuple[int, int], embed_dim: int, head_width: int = HEAD_WIDTH
) -> Preset:
    """Return a preset with a ViT, from (image size, patch size, width, layers) and the text tower's (width, layers)."""
    sizes: dict[str, Any] = dict(zip(("image_size", "patch_size", "image_width", "image_layers"), image, strict=True))
    return Preset(**sizes, text_width=text[0], text_layers=text[1], embed_dim=embed_dim, head_width=head_width)


PRESETS: dict[str, Preset] = {
    "tiny": _vit((40, 8, 128, 3), (128, 2), embed_dim=128, head_width=32),
    "small": _vit((48, 8, 192, 4), (192, 2), embed_dim=192, head_width=32),
    "vit_b32": _vit((224, 32, 768, 12), (512, 12), embed_dim=512),
    "vit_b16": _vit((224, 16, 768, 12), (512, 12), embed_dim=512),
    "vit_l14": _vit((224, 14, 1024, 24), (768, 12), embed_dim=768),
    "vit_l14_336": _vit((336, 14, 1024, 24), (768, 12), embed_dim=768),
    "rn50": Preset(image_tower="timm:resnet50_clip", image_size=224, text_width=512, embed_dim=1024),
    "rn101": Preset(image_tower="timm:resnet101_clip", image_size=224, text_width=512, embed_dim=512),
    "rn50x4": Preset(image_tower="timm:resnet50x4_clip", image_size=288, text_width=640, embed_dim=640),
    "rn50x16": Preset(image_tower="timm:resnet50x16_clip", image_size=384, text_width=768, embed_dim=768),
    "rn50x64": Preset(image_tower="timm:resnet50x64_clip", image_size=448, text_width=1024, embed_dim=1024),
}
_OTHER = Preset(image_size=0, text_width=512, embed_dim=512)
_SIZES = ("image_size", "patch_size", "image_width", "image_layers", "text_width", "text_layers", "embed_dim")


def resolve(config: ModelConfig) -> Preset:
    """Return the preset with the overrides of `config`.

    Raises:
        ConfigError: the preset is unknown, sizes do not divide, or the image tower does not use a key.
    """
    if config.preset.startswith(("auto:", "timm:")):
        preset = dataclasses.replace(_OTHER, image_tower=config.preset)
    elif config.preset in PRESETS:
        preset = PRESETS[config.preset]
    else:
        known = ", ".join([*PRESETS, "timm:<architecture>", "auto:<path or Hub id>"])
        raise ConfigError(f"model.preset: got {config.preset!r}, expected one of {known}")
    preset = dataclasses.replace(
        preset, **{name: size for name in _SIZES if (size := getattr(config, name)) is not None}
    )
    _check_multiple("text_width", preset.text_width, preset.head_width)
    if preset.image_tower == "vit":
        _check_multiple("image_width", preset.image_width, preset.head_width)
        _check_multiple("image_size", preset.image_size, preset.patch_size)
        return preset
    for name in ("patch_size", "image_width", "image_layers", "patch_dropout"):
        value = getattr(config, name)
        check(not value, f"model.{name}", value, f"preset {config.preset} does not use it: leave it out")
    if config.preset in PRESETS:
        _check_multiple("image_size", preset.image_size, RESNET_STRIDE)
    return preset


def _check_multiple(name: str, value: int, unit: int) -> None:
    check(value % unit == 0, f"model.{name}", value, f"expected a multiple of {unit}")


def tower_config(image_tower: str, image_size: int) -> tuple[Any, int]:
    """Return a tower's stock configuration and its image size, pixels.

    The stock class reads the width of the projection's input from `hidden_size`. Some configurations have no
    `hidden_size`, or another width of the pooled output. So it is set to the width after a forward pass on the meta
    device, which computes nothing. The default of `image_size` (0) is the tower's image size.

    Raises:
        ConfigError: the tower does not exist, has no pooled output, or does not accept this image size.
    """
    kind, name = image_tower.split(":", 1)
    config = _timm_config(name) if kind == "timm" else _auto_config(name)
    own_size = image_size_of(config)
    if image_size and image_size != own_size:
        _resize(config, image_size)
    size = image_size or own_size
    config.hidden_size = _pooled_width(config, image_tower, size)
    return config, size


def _timm() -> Any:
    """Return the library, which only models with such a tower need."""
    installation.require("train")
    import timm

    return timm


def _timm_config(architecture: str) -> TimmWrapperConfig:
    timm = _timm()
    similar = timm.list_models(f"*{architecture.split('_')[0]}*")[:5]
    check(
        timm.is_model(architecture), "model.preset", f"timm:{architecture}", f"no such architecture; similar: {similar}"
    )
    return TimmWrapperConfig(architecture=architecture)


def _auto_config(path: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.preset: auto:{path} cannot be read: {str(error).splitlines()[0]}") from error
    return getattr(config, "vision_config", config)  # a dual encoder's image tower


def image_size_of(config: Any) -> int:
    """Return the image size of a tower's stock configuration, pixels."""
    if isinstance(config, TimmWrapperConfig):
        known = _timm().get_pretrained_cfg(config.architecture)
        return int(known.input_size[-1]) if known else DEFAULT_IMAGE_SIZE
    size = getattr(config, "image_size", DEFAULT_IMAGE_SIZE)
    return int(size if isinstance(size, int) else size[0])


def _resize(config: Any, image_size: int) -> None:
    """Set the image size of the position embeddings. Convolutional towers have none and accept any size."""
    if isinstance(config, TimmWrapperConfig):
        arguments = {**(config.model_args or {}), "img_size": image_size}
        with suppress(TypeError), torch.device("meta"):  # TypeError: the tower has no such argument
            _timm().create_model(config.architecture, **arguments)
            config.model_args = arguments
    elif hasattr(config, "image_size"):
        config.image_size = image_size


def _pooled_width(config: Any, name: str, image_size: int) -> int:
    """Return the width D of a tower's pooled output (B, D)."""
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(config).eval()
            pooled = tower(pixel_values=torch.zeros(1, 3, image_size, image_size)).pooler_output
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.preset: {name} does not embed {image_size} pixel images: {error}") from error
    fits = pooled is not None and pooled.ndim == 2
    check(fits, "model.preset", name, "expected an image tower with a pooled output (B, D); use another")
    return int(pooled.shape[-1])


@torch.no_grad()
def initialize(model: StockModel) -> None:
    """Initialise a dual encoder, in place: towers of CLIP and timm, and the projections.

    Other towers keep the initial weights of transformers.
    """
    image_tower, text_tower, *projections, _ = parts(model)
    initialize_tower(image_tower)
    initialize_tower(text_tower)
    if isinstance(image_tower, TimmWrapperModel):
        _restore_timm(image_tower)
    for projection in projections:
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)


@torch.no_grad()
def initialize_tower(tower: nn.Module) -> None:
    """Initialise a CLIP tower, in place. Towers of other classes are not changed.

    The text transformer is initialised as in the paper's code (github.com/openai/CLIP, clip/model.py,
    `CLIP.initialize_parameters`): residual branches shrink with depth. That code leaves the ViT's layers at PyTorch's
    defaults; here they follow the same rule with their own width and depth. (transformers' `CLIPModel` swaps the
    standard deviations of the layers that read from and that write to the residual stream.)
    """
    layers = [module for module in tower.modules() if isinstance(module, CLIPEncoderLayer)]
    for layer in layers:
        _initialize_layer(layer, depth=len(layers))
    for module in tower.modules():
        _initialize_embeddings(module)


def _initialize_layer(layer: CLIPEncoderLayer, depth: int) -> None:
    width = layer.embed_dim
    write = width**-0.5 * (2 * depth) ** -0.5
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.normal_(layer.self_attn.out_proj.weight, std=write)
    nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(layer.mlp.fc2.weight, std=write)


def _initialize_embeddings(module: nn.Module) -> None:
    if isinstance(module, CLIPTextEmbeddings):
        nn.init.normal_(module.token_embedding.weight, std=0.02)
        nn.init.normal_(module.position_embedding.weight, std=0.01)
    elif isinstance(module, CLIPVisionEmbeddings):
        module.patch_embedding.reset_parameters()
        nn.init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
        nn.init.normal_(module.position_embedding.weight, std=module.embed_dim**-0.5)


def _restore_timm(tower: TimmWrapperModel) -> None:
    """Give a timm tower timm's initial weights.

    transformers initialises every layer with a standard deviation of 0.02, and then a deep ResNet hardly learns.
    """
    fresh = _timm().create_model(tower.config.architecture, num_classes=0, **(tower.config.model_args or {}))
    tower.timm_model.load_state_dict(fresh.state_dict())
