"""Tiny checkpoints of open_clip with random weights, as its `push_to_hf_hub` writes them: one of every kind."""

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from peer_models import LETTERS, draw, gemma_tokenizer, xlmr_tokenizer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import GemmaTokenizer, T5Tokenizer

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
BPE = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    **{"context_length": 64, "width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.5, "no_causal_mask": True},
    **{"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "timm/tiny"},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True}
TRUNK = {"image_size": 32, "timm_model_name": "vit_tiny_siglip_32", "timm_pool": "map", "timm_proj": "none"}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
MEANS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def _trunk(**options: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    return VisionTransformer(**sizes | {"class_token": False, "global_pool": "map"} | options)


def vit_tiny_siglip_32(**options: Any) -> VisionTransformer:
    """The smallest image tower of SigLIP's kind."""
    return _trunk(**options)


def vit_tiny_siglip2_32(**options: Any) -> VisionTransformer:
    """The same with the tanh approximation of GELU."""
    return _trunk(act_layer="gelu_tanh", **options)


def vit_tiny_scaled_32(**options: Any) -> VisionTransformer:
    """The same with layer scale, which no stock class has."""
    return _trunk(init_values=0.1, **options)


for function in (vit_tiny_siglip_32, vit_tiny_siglip2_32, vit_tiny_scaled_32):
    timm.models.register_model(function)
del function
del sys.modules[__name__].__dict__["__all__"]  # `register_model` writes it


def t5_tokenizer() -> Any:
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=[*entries, *(("▁" + letter, -2.5) for letter in LETTERS)], extra_ids=0)
    tokenizer.pad_token = "</s>"
    return tokenizer


# Name: (model_cfg, preprocess_cfg, tokenizer, stock class)
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "OpenAI": ({"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": BPE}, MEANS, None, "CLIPModel"),
    "LAION": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": BPE}, MEANS, None, "CLIPModel"),
    "other sizes": (
        {
            **{"embed_dim": 40, "custom_text": True, "init_logit_bias": -7.5, "nonscalar_logit_scale": True},
            "vision_cfg": VIT
            | {"head_width": 16, "mlp_ratio": 2.7, "norm_kwargs": {"eps": 1e-3}, "image_size": [32, 32]},
            "text_cfg": BPE | {"mlp_ratio": 1.5, "act_kwargs": {"approximate": "tanh"}, "context_length": 16},
        },
        SQUASH | {"interpolation": "bilinear"},
        None,
        "CLIPModel",
    ),
    "MetaCLIP 2": (
        {
            **{"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT},
            "text_cfg": BPE | {"pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "facebook/tiny"},
        },
        {},
        xlmr_tokenizer,
        "MetaClip2Model",
    ),
    "SigLIP": (SIGLIP | {"vision_cfg": TRUNK, "text_cfg": SIGLIP_TEXT}, SQUASH, t5_tokenizer, "SiglipModel"),
    "SigLIP 2": (
        SIGLIP
        | {
            "vision_cfg": TRUNK | {"timm_model_name": "vit_tiny_siglip2_32", "timm_model_pretrained": False},
            "text_cfg": SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}},
        },
        SQUASH,
        lambda: gemma_tokenizer(GemmaTokenizer),
        "SiglipModel",
    ),
}


def write(name: str, directory: Path) -> Path:
    """Write a tiny checkpoint of random weights as open_clip's `push_to_hf_hub` does."""
    model_cfg, preprocess_cfg, tokenizer, _ = CHECKPOINTS[name]
    directory.mkdir(parents=True)
    if tokenizer:
        files = tokenizer()
        files.save_pretrained(directory)
        model_cfg = model_cfg | {"text_cfg": model_cfg["text_cfg"] | {"vocab_size": len(files)}}
    settings = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (directory / "open_clip_config.json").write_text(json.dumps(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
        draw(model)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "open_clip_model.safetensors")
    return directory
