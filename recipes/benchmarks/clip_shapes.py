"""A CLIPModel with random weights, and the sizes of its towers, as exact types."""

from typing import NamedTuple

from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase

from koclip.config import ModelConfig
from koclip.models.dual_encoder import from_scratch


class Towers(NamedTuple):
    """The configurations of both towers."""

    vision: CLIPVisionConfig
    text: CLIPTextConfig


def towers(config: CLIPConfig) -> Towers:
    """Return the configurations of both towers; their types in transformers include mappings and None."""
    vision, text = config.vision_config, config.text_config
    assert isinstance(vision, CLIPVisionConfig)
    assert isinstance(text, CLIPTextConfig)
    return Towers(vision, text)


def integer(value: object) -> int:
    """Return a size or an id; its type in transformers includes list, tuple and None."""
    assert isinstance(value, int)
    return value


def build_clip(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[CLIPModel, CLIPProcessor]:
    """Return a `CLIPModel` with random weights, and its processor."""
    model, processor = from_scratch(config, tokenizer)
    assert isinstance(model, CLIPModel)
    assert isinstance(processor, CLIPProcessor)
    return model, processor
