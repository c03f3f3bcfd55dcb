"""Put the model of an alignment together: the source's image side, a text encoder, their processor."""

from typing import Any

import torch
from transformers import (
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from koclip.config import ConfigError, SwapConfig, check
from koclip.models.dual_encoder import checkpoint_gradients, text_config
from koclip.models.presets import HEAD_WIDTH, Preset, initialize_tower
from koclip.models.pretrained import load_text_encoder, take_padding
from koclip.models.stock import StockModel, is_stock, layout_of, parts
from koclip.models.swap import swap_text_tower
from koclip.text import tokenizers


def text_encoder(config: SwapConfig, clip: StockModel | PreTrainedModel) -> PreTrainedModel | None:
    """Return the text encoder that `config` names; None: a new text transformer.

    Raises:
        ConfigError: it cannot be loaded, or is to be that of a source of which only the image tower is taken.
    """
    if config.text_encoder is None:
        return None
    if config.text_encoder != "same":
        return load_text_encoder(config.text_encoder, config.seed)
    if not is_stock(clip):
        raise ConfigError(f"model.text_encoder: `same`, but {_alone(config.clip, clip)}: name a text encoder")
    own: PreTrainedModel = parts(clip).text_tower
    return own


def adapt(
    config: SwapConfig,
    clip: StockModel | PreTrainedModel,
    encoder: PreTrainedModel | None,
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[StockModel, ProcessorMixin]:
    """Return the dual encoder to be trained, and its processor.

    Args:
        config: The text side.
        clip: The source: a dual encoder, or an image tower alone.
        encoder: As `text_encoder` returned it.
        image_processor: The source's.
        tokenizer: The text side's.

    Raises:
        ConfigError: no stock class holds this pair.
    """
    if encoder is not None:
        take_padding(encoder, tokenizer.pad_token_id)
    if config.text_encoder == "same":
        model: Any = clip
    else:
        model = swap_text_tower(clip, encoder or _text_transformer(config, clip, tokenizer), config.seed)
    checkpoint_gradients(model, config.image_gradient_checkpointing, config.text_gradient_checkpointing)
    kind: Any = layout_of(model).processor_class
    return model, kind(image_processor=image_processor, tokenizer=tokenizer)


def load_teacher(clip: StockModel | PreTrainedModel, path: str) -> tuple[StockModel, PreTrainedTokenizerBase]:
    """Return the source with the tokenizer of its text tower, to be taught by.

    Raises:
        ConfigError: `clip` is an image tower alone, or its tokenizer cannot be relied on.
    """
    if not is_stock(clip):
        raise ConfigError(
            f"model.clip: {_alone(path, clip)}, and a teacher is a text tower: name a CLIP, or set distill.anchor to 0 "
            "and align.method to a method that sees images only"
        )
    text: Any = clip.config.text_config
    return clip, tokenizers.load(path, text.max_position_embeddings, text, probes=["a photo of a cat"])


def _alone(path: str, tower: PreTrainedModel) -> str:
    return f"of {path} koclip takes the image tower alone, a {type(tower).__name__}"


def _text_transformer(
    config: SwapConfig, clip: StockModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> CLIPTextModel:
    """Return CLIP's text transformer with random weights, as large as the source's if `config` does not say."""
    source: Any = getattr(clip.config, "text_config", None)
    width = config.text_width or getattr(source, "hidden_size", None)
    layers = config.text_layers or getattr(source, "num_hidden_layers", None)
    if width is None or layers is None:
        raise ConfigError(f"model.text_width, model.text_layers: name both, {_alone(config.clip, clip)}")
    head_width = HEAD_WIDTH if source is None else source.hidden_size // source.num_attention_heads
    check(width % head_width == 0, "model.text_width", width, f"expected a multiple of {head_width}")
    sizes = Preset(image_size=0, embed_dim=width, text_width=width, text_layers=layers, head_width=head_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tower = CLIPTextModel(text_config(sizes, tokenizer))
        initialize_tower(tower)
    return tower
