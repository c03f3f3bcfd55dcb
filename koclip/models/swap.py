"""Give a CLIP another text encoder. Image tower, image projection, logit scale and bias stay the same bit for bit.

The result is an instance of a stock class:

| image tower | text encoder | class |
|---|---|---|
| CLIP's ViT | BERT and similar encoders: RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT | `ChineseCLIPModel` |
| CLIP's ViT | CLIP's text transformer, with its own tokenizer | `CLIPModel` |
| any other | BERT and similar encoders, CLIP's text transformer | `VisionTextDualEncoderModel` |
| any | another encoder with a pooler: ALBERT, MPNet, ... | `VisionTextDualEncoderModel` |
| any | any other encoder, or the mean of all states instead of the first | `RouterModel`, for sentence-transformers |

If the source has no image projection (an image tower alone, or SigLIP), the projection is the identity.
The text embedding is a bias-free projection of the last hidden state of the first token, of the mean over all tokens,
or of the end token of CLIP's text transformer.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
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

from koclip.config import ConfigError, check
from koclip.models.first_token import read_first_token
from koclip.models.router import ENCODERS, Pooling, RouterConfig, RouterModel
from koclip.models.stock import StockModel, bias_of, is_stock, layout_of, parts, set_part

# Towers with the computation and the weight names of CLIP's ViT.
_CLIP_VITS = ("clip_vision_model", "chinese_clip_vision_model", "altclip_vision_model", "metaclip_2_vision_model")
_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "chinese_clip_text_model")
_WITHOUT_POOLER = ("electra", "distilbert", "chinese_clip_text_model")  # a BERT computes the same
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


def swap_text_tower(
    clip: StockModel | PreTrainedModel, text_encoder: PreTrainedModel, seed: int = 0, pooling: Pooling = "first"
) -> StockModel:
    """Return a dual encoder of `clip`'s image side and `text_encoder`, with a new text projection.

    Neither input is modified, except that the result may reuse `text_encoder` instead of copying it.

    Args:
        clip: A stock dual encoder, or an image tower with a pooled output (B, W) and W as its `config.hidden_size`.
        text_encoder: The encoder, without a head.
        seed: Seed of the text projection. Its standard deviation is width ** -0.5, as in CLIP.
        pooling: What the text embedding is a projection of: the `first` token's state, or the `mean` of all.

    Raises:
        ConfigError: `text_encoder` is no encoder, or has no first token to read.
    """
    image = _image_side(clip)
    swapped: Any = _builder(image, text_encoder, pooling)(image, text_encoder)
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


def _builder(image: _ImageSide, encoder: PreTrainedModel, pooling: Pooling) -> Callable[..., StockModel]:
    """Return the function that builds the first class of this module's table that holds a pair exactly."""
    kind = encoder.config.model_type
    clip_image = image.tower.config.model_type in _CLIP_VITS
    if kind == "clip_text_model":
        fix = "expected first: CLIP's text transformer reads its end token"
        check(pooling == "first", "model.pooling", pooling, fix)
        return _as_clip if clip_image else _as_pair
    narrow = getattr(encoder.config, "embedding_size", None) not in (None, encoder.config.hidden_size)
    if pooling == "first" and kind in _BERT and not (kind == "electra" and narrow):
        return _as_chinese_clip if clip_image else _as_pair
    if pooling == "first" and kind in _POOLED:
        return _as_pair
    _check_encoder(encoder, pooling)
    return partial(_as_router, pooling=pooling)


def _check_encoder(encoder: PreTrainedModel, pooling: Pooling) -> None:
    """Check that an encoder has hidden states in which every token sees every other, and padding none.

    Raises:
        ConfigError: it has not, or it has no first token to read.
    """
    if encoder.device.type == "meta":  # it has no values to compare
        return
    kind, got = encoder.config.model_type, f"a {type(encoder).__name__}"
    both = getattr(encoder.config, "is_encoder_decoder", False) and kind not in ENCODERS
    check(not both, "model.text_encoder", got, f"a {kind} is an encoder with a decoder: expected an encoder alone")
    fix = f"expected mean, because a {kind} has no token at the start of a text"
    check(pooling == "mean" or kind not in ENCODERS, "model.pooling", pooling, fix)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 8, 8]], device=encoder.device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], device=encoder.device)
    was_training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            padded = encoder(input_ids=ids[2:, :2], attention_mask=mask[2:, :2]).last_hidden_state
        seen = not torch.equal(states[0, 0], states[1, 0])
        hidden = torch.allclose(states[2, :2], padded[0], rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise ConfigError(f"model.text_encoder: got {got}, which gives no hidden states of a text: {error}") from error
    finally:
        encoder.train(was_training)
    fix = "expected an encoder, in which every token sees all others, such as a BERT or a ModernBERT"
    check(seen, "model.text_encoder", got, f"a {kind} is a decoder: {fix}")
    check(hidden, "model.text_encoder", got, f"padding changes the states of a {kind}: {fix}")


def _image_side(clip: StockModel | PreTrainedModel) -> _ImageSide:
    source = parts(clip) if is_stock(clip) else None
    tower = source.image_tower if source else clip
    scale = source.logit_scale.reshape(()) if source else torch.tensor(math.log(1 / _START_TEMPERATURE), device="cpu")
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
    if text_encoder.config.model_type in _WITHOUT_POOLER:
        settings, weights = _as_bert(text_encoder)
        text_encoder = BertModel(BertConfig(**settings), add_pooling_layer=False)
        text_encoder.load_state_dict(weights)
    read_first_token(text_encoder)
    tower = _own_tower(image)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower.config, text_encoder.config, **image.config)
    return VisionTextDualEncoderModel(config=config, vision_model=tower, text_model=text_encoder)


def _as_router(image: _ImageSide, text_encoder: PreTrainedModel, pooling: Pooling) -> StockModel:
    tower = _own_tower(image)
    config = RouterConfig.from_vision_text_configs(tower.config, text_encoder.config, pooling=pooling, **image.config)
    return RouterModel(config, tower, text_encoder)


def _own_tower(image: _ImageSide) -> PreTrainedModel:
    """Return a copy of the image tower in a class that can be loaded alone. The source may be the teacher."""
    if image.tower.config.model_type not in _CLIP_VITS:
        return copy.deepcopy(image.tower)
    tower = CLIPVisionModel(CLIPVisionConfig(**image.vision_config))
    tower.load_state_dict(image.tower.state_dict())
    return tower


def _as_bert(encoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the weights of a BERT with exactly the outputs of `encoder`.

    Raises:
        ConfigError: attention that BERT does not have.
    """
    config = encoder.config
    if config.model_type == "distilbert":
        return _from_distilbert(encoder)
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
