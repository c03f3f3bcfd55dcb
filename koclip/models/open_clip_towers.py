"""Stock models with the settings and weights of an open_clip model. `koclip.models.open_clip` reads its files."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)

from koclip import installation
from koclip.config import ConfigError, check
from koclip.models.stock import StockModel

_KEY = "model.clip"
# Settings of `CLIPVisionCfg` and `CLIPTextCfg` that only training uses, or that weights override.
_UNUSED = {
    *("patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "attn_pooler_queries"),
    *("attn_pooler_heads", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
# Settings that must have their default, because no stock class has another value.
_DEFAULTS = {
    **dict.fromkeys(("ls_init_value", "block_type", "hf_model_name"), None),
    **dict.fromkeys(("attentional_pool", "no_ln_pre", "final_ln_after_pool", "output_tokens", "embed_cls"), False),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), False),
    **{"scale_fc": False, "pos_embed_type": "learnable", "proj_type": "linear"},
}
_SIZES = ("width", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs")
_VIT = {*_SIZES, "head_width", "patch_size", "image_size"}
_TIMM = {"timm_model_name", "image_size"}
_TEXT = {*_SIZES, "heads", "context_length", "vocab_size", "eos_id"}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_MODEL |= {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"}


class _Section(NamedTuple):
    """A section of `model_cfg`, with its name for error messages."""

    name: str
    values: Mapping[str, Any]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def require(self, read: set[str], **fixed: Any) -> None:
        """Check that all settings are known: those in `read` have any value, those in `fixed` exactly one.

        Raises:
            ConfigError: a setting is unknown, or no stock class has its value.
        """
        fixed = _DEFAULTS | fixed
        for key, value in self.values.items():
            if key not in read | _UNUSED and key not in fixed:
                raise ConfigError(f"{self.name}.{key}: got {value!r}, a setting that koclip cannot convert")
        for key, expected in fixed.items():
            got = self.values.get(key, _DEFAULTS.get(key))
            same = got == expected or (not got and not expected)
            check(same, f"{self.name}.{key}", got, f"no stock class of transformers has it; expected {expected!r}")


def build(spec: str, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> StockModel:
    """Return a stock model with random weights and the settings of `model_cfg`, for `tokenizer`.

    Raises:
        ConfigError: no stock class has these settings, or the tokenizer has other ids.
    """
    model = _Section(f"{_KEY}: {spec}, model_cfg", settings)
    unknown = sorted(set(settings) - _MODEL)
    check(not unknown, model.name, unknown, "settings that koclip cannot convert; expected a model of two towers")
    for name in ("vision_cfg", "text_cfg"):
        check(name in settings, f"{model.name}.{name}", None, "expected the settings of a tower")
    vision = _Section(f"{model.name}.vision_cfg", {"pool_type": "tok"} | settings["vision_cfg"])
    text = _Section(f"{model.name}.text_cfg", {"pool_type": "argmax"} | settings["text_cfg"])
    largest = max(tokenizer.get_vocab().values())
    vocabulary = text.get("vocab_size", 49408)
    check(largest < vocabulary, f"{text.name}.vocab_size", vocabulary, f"its tokenizer has ids up to {largest}")
    if vision.values.get("timm_model_name"):
        return _siglip(model, vision, text, tokenizer)
    return _clip(model, vision, text, tokenizer)


def _clip(model: _Section, vision: _Section, text: _Section, tokenizer: Any) -> StockModel:
    pool = text.values["pool_type"]
    check(pool in ("argmax", "eos"), f"{text.name}.pool_type", pool, "expected argmax or eos beside this image tower")
    vision.require(_VIT, pool_type="tok")
    text.require(_TEXT, pool_type=pool, no_causal_mask=False, proj_bias=False)
    layers = vision.get("layers", 12)
    check(isinstance(layers, int), f"{vision.name}.layers", layers, "a ResNet, which no stock class has")
    largest = max(tokenizer.get_vocab().values())
    end = largest if pool == "argmax" else text.get("eos_id", 2)
    fix = f"its text tower reads the token with id {end}, which must be the tokenizer's end token"
    check(tokenizer.eos_token_id == end, f"{text.name}.pool_type {pool}", tokenizer.eos_token_id, fix)
    width = vision.get("width", 768)
    quick = bool(model.values.get("quick_gelu"))
    images = _sizes(vision, width, width // vision.get("head_width", 64), quick)
    images |= {"image_size": _side(vision), "patch_size": vision.get("patch_size", 16)}
    settings: dict[str, Any] = {
        "text_config": _text(text, tokenizer, quick),
        "vision_config": images,
        "projection_dim": model.values["embed_dim"],
    }
    # `CLIPModel` reads the largest id if its end token is 2; `MetaClip2Model` always reads the end token.
    return CLIPModel(CLIPConfig(**settings)) if pool == "argmax" else MetaClip2Model(MetaClip2Config(**settings))


def _siglip(model: _Section, vision: _Section, text: _Section, tokenizer: Any) -> StockModel:
    vision.require(_TIMM | {"pool_type"}, timm_pool="map", timm_proj="none", timm_proj_bias=False)
    text.require(_TEXT, pool_type="last", no_causal_mask=True, proj_bias=True)
    trunk = _timm_trunk(vision)
    images, width = _trunk_settings(vision, trunk), model.values["embed_dim"]
    fix = f"expected the width of the image tower, {images['hidden_size']}"
    check(images["hidden_size"] == width, f"{model.name}.embed_dim", width, fix)
    words = _text(text, tokenizer, quick_gelu=False) | {"projection_size": width}
    stock = SiglipModel(SiglipConfig(text_config=words, vision_config=images))
    own = {name for name in stock.state_dict() if name.startswith("vision_model.")}
    others = own ^ set(renamed({f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}))
    key = f"{vision.name}.timm_model_name"
    check(not others, key, vision.values["timm_model_name"], f"no stock class has its {', '.join(sorted(others)[:3])}")
    return stock


def _timm_trunk(vision: _Section) -> Any:
    """Return a ViT of timm with attention pooling, without memory for its weights.

    Raises:
        ConfigError: timm does not know the model, or it is another kind of model.
    """
    installation.require("train")
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name, key = vision.values["timm_model_name"], f"{vision.name}.timm_model_name"
    check(timm.is_model(name), key, name, f"timm {timm.__version__} does not have this model")
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    pooled = isinstance(trunk, VisionTransformer) and trunk.attn_pool is not None
    check(pooled, key, name, "expected a ViT with attention pooling")
    return trunk


def _trunk_settings(vision: _Section, trunk: Any) -> dict[str, Any]:
    """Return the settings of `SiglipVisionConfig` with which it computes the same as `trunk`."""
    patches, layer, pool = trunk.patch_embed, trunk.blocks[0], trunk.attn_pool
    settings = {  # each must be the same everywhere
        "hidden_act": {_activation(layer.mlp.act), _activation(pool.mlp.act)},
        "num_attention_heads": {layer.attn.num_heads, pool.num_heads},
        "layer_norm_eps": {layer.norm1.eps, trunk.norm.eps, pool.norm.eps},
        "image_size": {*patches.img_size, _side(vision)},
    }
    several = {setting: sorted(values) for setting, values in settings.items() if len(values) > 1}
    name = vision.values["timm_model_name"]
    check(not several, f"{vision.name}.timm_model_name", name, f"expected a single value each, not {several}")
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": layer.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "patch_size": patches.patch_size[0],
        **{setting: values.pop() for setting, values in settings.items()},
    }


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return "gelu_pytorch_tanh" if type(module).__name__ == "GELUTanh" else type(module).__name__


def _text(text: _Section, tokenizer: Any, quick_gelu: bool) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = _sizes(text, text.get("width", 512), text.get("heads", 8), quick_gelu)
    lengths = {"max_position_embeddings": text.get("context_length", 77), "vocab_size": text.get("vocab_size", 49408)}
    return sizes | lengths | ids


def _sizes(section: _Section, width: int, heads: int, quick_gelu: bool) -> dict[str, Any]:
    norm, act = section.get("norm_kwargs", {}), section.get("act_kwargs", {})
    check(set(norm) <= {"eps"}, f"{section.name}.norm_kwargs", norm, "expected eps only")
    check(act in ({}, {"approximate": "tanh"}), f"{section.name}.act_kwargs", act, 'expected {"approximate": "tanh"}')
    activation = "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if act else "gelu"
    return {
        "hidden_size": width,
        "intermediate_size": int(width * section.get("mlp_ratio", 4.0)),
        "num_hidden_layers": section.get("layers", 12),
        "num_attention_heads": heads,
        "hidden_act": activation,
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def _side(vision: _Section) -> int:
    size = vision.get("image_size", 224)
    sides = set(size) if isinstance(size, list) else {size}
    check(len(sides) == 1, f"{vision.name}.image_size", size, "expected a square")
    return int(sides.pop())


# Patterns of names in open_clip, and the names in transformers. Both towers of open_clip have the same blocks.
_BLOCK = {
    r"\.resblocks\.(\d+)\.": r".encoder.layers.\1.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.": ".self_attn.",
}
_TEXT_NAMES = {
    r"^(text\.)?transformer\.": "text_model.",
    r"^(text\.)?token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^(text\.)?positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^(text\.)?ln_final\.": "text_model.final_layer_norm.",
    r"^(text\.)?text_projection\.": "text_model.head.",  # a linear layer with a bias, in SigLIP
    r"^(text\.)?text_projection$": "text_projection.weight",
}
_VIT_NAMES = {
    r"^visual\.transformer\.": "vision_model.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
}
_TIMM_NAMES = {
    r"^visual\.trunk\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.trunk\.pos_embed$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.trunk\.norm\.": "vision_model.post_layernorm.",
    r"^visual\.trunk\.blocks\.(\d+)\.": r"vision_model.encoder.layers.\1.",
    r"^visual\.trunk\.attn_pool\.latent$": "vision_model.head.probe",
    r"^visual\.trunk\.attn_pool\.proj\.": "vision_model.head.attention.out_proj.",
    r"^visual\.trunk\.attn_pool\.norm\.": "vision_model.head.layernorm.",
    r"^visual\.trunk\.attn_pool\.": "vision_model.head.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.self_attn\.proj\.": ".self_attn.out_proj.",
}
_NAMES = _BLOCK | _TEXT_NAMES | _VIT_NAMES | _TIMM_NAMES
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")  # open_clip multiplies from the right


def renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an open_clip model under the names of transformers, in their shapes."""
    result: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        for pattern, new in _NAMES.items():
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"(.*self_attn\.)(?:in_proj_|qkv\.)(weight|bias)", name):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{match[1]}{letter}_proj.{match[2]}"] = part
        elif match := re.fullmatch(r"(vision_model\.head\.)q\.(weight|bias)", name):
            pair = weights[f"visual.trunk.attn_pool.kv.{match[2]}"]
            result[f"{match[1]}attention.in_proj_{match[2]}"] = torch.cat([value, pair])
        elif name.startswith("vision_model.head.kv."):
            continue
        elif name.endswith("position_embedding.weight"):
            result[name] = value.reshape(value.shape[-2:])  # timm's has a batch dimension
        else:
            result[name] = value.T if name in _TRANSPOSED else value
    return {name: value.contiguous() for name, value in result.items()}


def fill(spec: str, model: StockModel, weights: dict[str, torch.Tensor]) -> None:
    """Load `weights` into `model`.

    Raises:
        ConfigError: weights are missing or unexpected, or have another shape.
    """
    own = model.state_dict()
    scalars = [name for name in ("logit_scale", "logit_bias") if name in weights and name in own]
    weights = weights | {name: weights[name].reshape(own[name].shape) for name in scalars}
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in weights.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    text = "; ".join(f"{len(names)} {fault}, for example {names[0]}" for fault, names in faults.items() if names)
    if text:
        kind = type(model).__name__
        raise ConfigError(f"{_KEY}: {spec} does not have the weights of a {kind} of its settings: {text}")
    model.load_state_dict(weights)
