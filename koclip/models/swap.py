"""Give a CLIP another text encoder. Its image space is kept bit for bit: image tower, projection, logit scale.

The result is a stock class, so saving converts only the number of text positions:

| image tower | text encoder | class |
|---|---|---|
| CLIP's ViT | BERT and similar encoders: RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT | `ChineseCLIPModel` |
| CLIP's ViT | CLIP's text transformer, with a tokenizer of its own | `CLIPModel` |
| any other, or CLIP's ViT | any encoder with a pooler, CLIP's text transformer | `VisionTextDualEncoderModel` |

An image tower alone, or that of a SigLIP, gets the identity as its projection: its pooled output is the image space.
A text's embedding is a bias-free projection of its first token's last hidden state (`ChineseCLIPModel`), of its end
token's (`CLIPModel`), or of what the encoder's pooler returns (`VisionTextDualEncoderModel`).
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from koclip.config import ConfigError
from koclip.models.stock import StockModel, bias_of, is_stock, layout_of, parts, set_part

# Towers that compute what CLIP's ViT computes, under the same names.
_CLIP_VITS = ("clip_vision_model", "chinese_clip_vision_model", "altclip_vision_model", "metaclip_2_vision_model")
_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "chinese_clip_text_model")
_POOLED = ("albert", "mpnet", "big_bird", "roberta-prelayernorm", "ernie", "xlm-roberta-xl", "data2vec-text")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # whose positions begin behind the padding id
_BERT_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "layer_norm_eps"),
    *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_DISTILBERT_NAMES = {
    "transformer.layer": "encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_START_TEMPERATURE = 0.07  # the paper's, for an image tower that has none


class _ImageSide(NamedTuple):
    """What is kept: a tower, the projection of its pooled output, and the logit scale."""

    tower: PreTrainedModel
    projection: torch.Tensor  # (D, W)
    logit_scale: torch.Tensor  # ()

    @property
    def config(self) -> dict[str, Any]:
        """What the configurations of all joint classes share."""
        return {"projection_dim": len(self.projection), "logit_scale_init_value": self.logit_scale.item()}


def swap_text_tower(clip: StockModel | PreTrainedModel, text_encoder: PreTrainedModel, seed: int = 0) -> StockModel:
    """Return a dual encoder of `clip`'s image side and `text_encoder`, with a new text projection.

    Neither input is modified, except that a `VisionTextDualEncoderModel` reuses `text_encoder` instead of copying it.

    Args:
        clip: A `CLIPModel` or any other stock dual encoder, whose image side is kept; or an image tower alone, with a
            pooled output (B, W) and W as its `config.hidden_size`.
        text_encoder: The encoder, without a head.
        seed: Seed of the text projection, whose standard deviation is that of CLIP: width ** -0.5.

    Raises:
        ConfigError: no stock class holds this pair.
    """
    image = _image_side(clip)
    kind = text_encoder.config.model_type
    clip_image = image.tower.config.model_type in _CLIP_VITS
    swapped: Any
    if clip_image and kind == "clip_text_model":
        swapped = _as_clip(image, text_encoder)
    elif clip_image and kind in _BERT:
        swapped = _as_chinese_clip(image, text_encoder)
    elif kind in (*_BERT, *_POOLED, "clip_text_model"):
        swapped = _as_pair(image, text_encoder)
    else:
        raise ConfigError(
            f"text encoder: no stock class holds a {kind} beside this image tower; CLIP's ViT takes "
            f"{', '.join(('clip_text_model', *_BERT, *_POOLED))}, other image towers need an encoder with a pooler"
        )
    with torch.no_grad():
        target = parts(swapped)
        target.image_projection.weight.copy_(image.projection)
        target.logit_scale.copy_(image.logit_scale)
        if is_stock(clip) and bias_of(clip) is not None:
            set_part(swapped, layout_of(swapped).logit_bias, bias_of(clip))
        generator = torch.Generator().manual_seed(seed)
        width = target.text_projection.in_features
        target.text_projection.weight.normal_(std=width**-0.5, generator=generator)
    stock: StockModel = swapped.to(clip.dtype)
    return stock


def _image_side(clip: StockModel | PreTrainedModel) -> _ImageSide:
    if is_stock(clip):
        source = parts(clip)
        if isinstance(source.image_projection, nn.Linear):
            return _ImageSide(source.image_tower, source.image_projection.weight, source.logit_scale)
        return _ImageSide(source.image_tower, _identity(source.image_tower), source.logit_scale.reshape(()))
    return _ImageSide(clip, _identity(clip), torch.tensor(math.log(1 / _START_TEMPERATURE)))


def _identity(tower: PreTrainedModel) -> torch.Tensor:
    return torch.eye(tower.config.hidden_size, dtype=tower.dtype, device=tower.device)


def _as_clip(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    config = CLIPConfig(
        text_config=text_encoder.config.to_dict() | {"projection_dim": len(image.projection)},
        vision_config=_vision_config(image),
        **image.config,
    )
    swapped = CLIPModel(config)
    parts(swapped).image_tower.load_state_dict(image.tower.state_dict())
    parts(swapped).text_tower.load_state_dict(text_encoder.state_dict())
    return swapped


def _as_chinese_clip(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    text, weights = _as_bert(text_encoder)
    config = ChineseCLIPConfig(text_config=text, vision_config=_vision_config(image), **image.config)
    swapped = ChineseCLIPModel(config)
    parts(swapped).image_tower.load_state_dict(image.tower.state_dict())
    tower = parts(swapped).text_tower
    tower.load_state_dict(weights)
    with torch.no_grad():  # as `from_pretrained` leaves it; padding is masked, so that no embedding changes
        tower.embeddings.word_embeddings.weight[text["pad_token_id"]] = 0
    return swapped


def _as_pair(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    pooled = text_encoder.config.model_type == "clip_text_model" or getattr(text_encoder, "pooler", None) is not None
    if not pooled:
        raise ConfigError(
            f"text encoder: this {type(text_encoder).__name__} has no pooler, whose output a "
            "VisionTextDualEncoderModel projects; load it with its pooling layer, or take a CLIP image tower"
        )
    if image.tower.config.model_type in _CLIP_VITS:  # not all of these classes exist on their own
        tower: Any = CLIPVisionModel(CLIPVisionConfig(**_vision_config(image)))
        tower.load_state_dict(image.tower.state_dict())
    else:
        tower = copy.deepcopy(image.tower)  # the source may be the teacher while the copy is trained
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower.config, text_encoder.config, **image.config)
    return VisionTextDualEncoderModel(config=config, vision_model=tower, text_model=text_encoder)


def _vision_config(image: _ImageSide) -> dict[str, Any]:
    return {name: value for name, value in image.tower.config.to_dict().items() if name != "model_type"}


def _as_bert(encoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the weights of the BERT that computes what `encoder` computes, exactly.

    Raises:
        ConfigError: an ELECTRA whose embeddings are narrower than its layers, or attention that BERT does not have.
    """
    config = encoder.config
    if config.model_type == "distilbert":
        return _from_distilbert(encoder)
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ConfigError(
            f"text encoder: this ELECTRA embeds tokens in {config.embedding_size} dimensions and computes in "
            f"{config.hidden_size}; no stock class holds that. Take the base size, whose widths are equal"
        )
    _check_attention(config)
    weights = {name: value.clone() for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    positions = "embeddings.position_embeddings.weight"
    if config.model_type in _OFFSET_POSITIONS:
        weights[positions] = weights[positions][config.pad_token_id + 1 :]
    text = {name: getattr(config, name, None) for name in _BERT_SETTINGS}
    return text | {"max_position_embeddings": len(weights[positions])}, weights


def _from_distilbert(encoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, weights = encoder.config, {}
    for name, value in encoder.state_dict().items():
        for old, new in _DISTILBERT_NAMES.items():
            name = name.replace(old, new)
        weights[name] = value.clone()
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.dim)
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-12,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
    }
    return text, weights


def _check_attention(config: Any) -> None:
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute" or getattr(config, "is_decoder", False):
        raise ConfigError(f"text encoder: expected absolute positions and an encoder, got {kind} positions")


def linear_pooler(vision_model: nn.Module) -> None:
    """Make a ViT's pooler return the class token. Checkpoints of google/vit-* have no pooler.

    The stock configuration says so (`pooler_act: linear`), so the published model computes the same.
    """
    pooler: Any = vision_model.pooler
    with torch.no_grad():
        pooler.dense.weight.copy_(torch.eye(len(pooler.dense.weight)))
        pooler.dense.bias.zero_()
    pooler.activation = nn.Identity()
    vision_model.config.pooler_act = "linear"  # type: ignore[union-attr]
