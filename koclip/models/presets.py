"""Sizes of the CLIP paper's eight models (Radford et al. 2021, tables 19 and 20) and of small ones for a CPU."""

import dataclasses
from dataclasses import dataclass

from koclip.config import ConfigError, ModelConfig, check

HEAD_WIDTH = 64  # of every tower in the paper; the small presets use 32
RESNETS = {
    "rn50": "resnet50_clip",
    "rn101": "resnet101_clip",
    "rn50x4": "resnet50x4_clip",
    "rn50x16": "resnet50x16_clip",
    "rn50x64": "resnet50x64_clip",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Every size of a dual encoder. `image_tower` names the kind: a ViT, a timm architecture or a path."""

    image_tower: str = "vit"
    image_size: int
    patch_size: int = 0
    image_width: int = 0
    image_layers: int = 0
    text_width: int
    text_layers: int = 12
    embed_dim: int
    head_width: int = HEAD_WIDTH


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        image_size=32,
        patch_size=8,
        image_width=128,
        image_layers=3,
        text_width=128,
        text_layers=1,
        embed_dim=128,
        head_width=32,
    ),
    "small": Preset(
        image_size=48,
        patch_size=8,
        image_width=192,
        image_layers=4,
        text_width=192,
        text_layers=2,
        embed_dim=192,
        head_width=32,
    ),
    "vit_b32": Preset(
        image_size=224, patch_size=32, image_width=768, image_layers=12, text_width=512, embed_dim=512
    ),
    "vit_b16": Preset(
        image_size=224, patch_size=16, image_width=768, image_layers=12, text_width=512, embed_dim=512
    ),
    "vit_l14": Preset(
        image_size=224, patch_size=14, image_width=1024, image_layers=24, text_width=768, embed_dim=768
    ),
    "vit_l14_336": Preset(
        image_size=336, patch_size=14, image_width=1024, image_layers=24, text_width=768, embed_dim=768
    ),
    "rn50": Preset(image_tower=RESNETS["rn50"], image_size=224, text_width=512, embed_dim=1024),
    "rn101": Preset(image_tower=RESNETS["rn101"], image_size=224, text_width=512, embed_dim=512),
    "rn50x4": Preset(image_tower=RESNETS["rn50x4"], image_size=288, text_width=640, embed_dim=640),
    "rn50x16": Preset(image_tower=RESNETS["rn50x16"], image_size=384, text_width=768, embed_dim=768),
    "rn50x64": Preset(image_tower=RESNETS["rn50x64"], image_size=448, text_width=1024, embed_dim=1024),
}
_AUTO = Preset(image_tower="auto", image_size=224, text_width=512, embed_dim=512)


def resolve(config: ModelConfig) -> Preset:
    """Return the preset with the overrides of `config`, checked to be buildable.

    Raises:
        ConfigError: an unknown preset, or sizes that do not divide.
    """
    if config.preset.startswith("auto:"):
        preset = dataclasses.replace(_AUTO, image_tower=config.preset)
    elif config.preset in PRESETS:
        preset = PRESETS[config.preset]
    else:
        known = ", ".join([*PRESETS, "auto:<path or Hub id>"])
        raise ConfigError(f"model.preset: got {config.preset!r}, expected one of {known}")
    sizes = {field.name for field in dataclasses.fields(preset)} & set(dataclasses.asdict(config))
    changed = {name: value for name in sizes if (value := getattr(config, name)) is not None}
    tower_sizes = sorted(changed.keys() & {"patch_size", "image_width", "image_layers"})
    check(
        preset.image_tower == "vit" or not tower_sizes,
        f"model.{tower_sizes[0] if tower_sizes else ''}",
        tower_sizes,
        f"preset {config.preset} brings its own image tower: leave these out",
    )
    preset = dataclasses.replace(preset, **changed)
    head = preset.head_width
    check(preset.text_width % head == 0, "model.text_width", preset.text_width, f"expected a multiple of {head}")
    if preset.image_tower == "vit":
        check(
            preset.image_size % preset.patch_size == 0,
            "model.image_size",
            preset.image_size,
            f"expected a multiple of model.patch_size ({preset.patch_size})",
        )
        check(preset.image_width % head == 0, "model.image_width", preset.image_width, f"expected a multiple of {head}")
    return preset
