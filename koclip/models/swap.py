"""Give a CLIP another text encoder. Image tower, image projection, logit scale and bias stay the same bit for bit.

The result is an instance of a stock class:

| image tower | text encoder | class |
|---|---|---|
| CLIP's ViT | BERT and similar encoders: RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT | `ChineseCLIPModel` |
| CLIP's ViT | CLIP's text transformer, with its own tokenizer | `CLIPModel` |
| any other, or CLIP's ViT | any encoder with a pooler, CLIP's text transformer | `VisionTextDualEncoderModel` |

If the source has no image projection (an image tower alone, or SigLIP), the projection is the identity.
The text embedding is a bias-free projection of the last hidden state of the first token (`ChineseCLIPModel`) or of the
end token (`CLIPModel`), or of the pooler's output (`VisionTextDualEncoderModel`).
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

# Towers with the computation and the weight names of CLIP's ViT.
_CLIP_VITS = ("clip_vision_model", "chinese_clip_vision_model", "altclip_vision_model", "metaclip_2_vision_model")
_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "chinese_clip_text_model")
_POOLED = ("albert", "mpnet", "big_bird", "roberta-prelayernorm", "ernie", "xlm-roberta-xl", "data2vec-text")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # positions start after the padding token's id
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
_START_TEMPERATURE = 0.07  # of an image tower without a logit scale; the paper's value


class _ImageSide(NamedTuple):
    """The parts of the source that the result keeps."""

    tower: PreTrainedModel
    projection: torch.Tensor  # (D, W)
    logit_scale: torch.Tensor  # ()

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the result's configuration."""
        return {"projection_dim": len(self.projection), "logit_scale_init_value": self.logit_scale.item()}

    @property
    def vision_config(self) -> dict[str, Any]:
        """Settings of the image tower, without its type."""
        return {name: value for name, value in self.tower.config.to_dict().items() if name != "model_type"}


def swap_text_tower(clip: StockModel | PreTrainedModel, text_encoder: PreTrainedModel, seed: int = 0) -> StockModel:
    """Return a dual encoder of `clip`'s image side and `text_encoder`, with a new text projection.

    Neither input is modified, except that a `VisionTextDualEncoderModel` reuses `text_encoder` instead of copying it.

    Args:
        clip: A stock dual encoder, or an image tower with a pooled output (B, W) and W as its `config.hidden_size`.
        text_encoder: The encoder, without a head.
        seed: Seed of the text projection. Its standard deviation is width ** -0.5, as in CLIP.

    Raises:
        ConfigError: no stock class can hold this pair.
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
            f"text encoder: got a {kind}; no stock class holds it beside this image tower. Expected one of "
            f"{', '.join(('clip_text_model', *_BERT, *_POOLED))}"
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
    source = parts(clip) if is_stock(clip) else None
    tower = source.image_tower if source else clip
    scale = source.logit_scale.reshape(()) if source else torch.tensor(math.log(1 / _START_TEMPERATURE))
    if source and isinstance(source.image_projection, nn.Linear):
        return _ImageSide(tower, source.image_projection.weight, scale)
    return _ImageSide(tower, torch.eye(tower.config.hidden_size, dtype=tower.dtype, device=tower.device), scale)


def _as_clip(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    text = text_encoder.config.to_dict() | {"projection_dim": len(image.projection)}
    swapped = CLIPModel(CLIPConfig(text_config=text, vision_config=image.vision_config, **image.config))
    parts(swapped).image_tower.load_state_dict(image.tower.state_dict())
    parts(swapped).text_tower.load_state_dict(text_encoder.state_dict())
    return swapped


def _as_chinese_clip(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    text, weights = _as_bert(text_encoder)
    swapped = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=image.vision_config, **image.config))
    parts(swapped).image_tower.load_state_dict(image.tower.state_dict())
    tower = parts(swapped).text_tower
    tower.load_state_dict(weights)
    with torch.no_grad():  # as after `from_pretrained`; padding is masked, so no embedding changes
        tower.embeddings.word_embeddings.weight[text["pad_token_id"]] = 0
    return swapped


def _as_pair(image: _ImageSide, text_encoder: PreTrainedModel) -> StockModel:
    if text_encoder.config.model_type != "clip_text_model" and getattr(text_encoder, "pooler", None) is None:
        raise ConfigError(
            f"text encoder: got a {type(text_encoder).__name__} without a pooler, expected a pooler, because a "
            "VisionTextDualEncoderModel projects its output; load it with its pooler, or use a CLIP image tower"
        )
    if image.tower.config.model_type in _CLIP_VITS:  # not every class of these towers can be loaded alone
        tower: Any = CLIPVisionModel(CLIPVisionConfig(**image.vision_config))
        tower.load_state_dict(image.tower.state_dict())
    else:
        tower = copy.deepcopy(image.tower)  # the source may be the teacher, and must not change
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower.config, text_encoder.config, **image.config)
    return VisionTextDualEncoderModel(config=config, vision_model=tower, text_model=text_encoder)


def _as_bert(encoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the weights of a BERT with exactly the outputs of `encoder`.

    Raises:
        ConfigError: an ELECTRA whose embeddings are narrower than its layers, or attention that BERT does not have.
    """
    config = encoder.config
    if config.model_type == "distilbert":
        return _from_distilbert(encoder)
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ConfigError(
            f"text encoder: got an ELECTRA with token embeddings of width {config.embedding_size} and layers of width "
            f"{config.hidden_size}, expected equal widths: use the base size"
        )
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute" or getattr(config, "is_decoder", False):
        raise ConfigError(f"text encoder: got {kind} positions, expected an encoder with absolute positions")
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


def linear_pooler(vision_model: nn.Module) -> None:
    """Make a ViT's pooler return the class token, for checkpoints without a pooler (google/vit-*).

    The configuration records this (`pooler_act: linear`), so the published model computes the same.
    """
    pooler: Any = vision_model.pooler
    nn.init.eye_(pooler.dense.weight)
    nn.init.zeros_(pooler.dense.bias)
    pooler.activation = nn.Identity()
    vision_model.config.pooler_act = "linear"  # type: ignore[union-attr]
