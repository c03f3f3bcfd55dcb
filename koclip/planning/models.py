"""The model of a run, built from configurations only: no weights are downloaded and no captions are read.

On the meta device it takes no memory, however large it is. On another device it has random weights, to measure steps.
"""

import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, CLIPTokenizer, PreTrainedTokenizerBase

from koclip import config, losses
from koclip.align import lora
from koclip.align.methods import METHODS, Source, new_text_tower, text_encoder, text_pooling
from koclip.config import AlignConfig, ConfigError, PretrainConfig, Stage, SwapConfig
from koclip.models.dual_encoder import DualEncoder, checkpoint_gradients, from_scratch
from koclip.models.presets import image_size_of, tower_config
from koclip.models.pretrained import UNREADABLE, unreadable
from koclip.models.stock import is_stock, layout_of, set_part
from koclip.models.swap import swap_text_tower
from koclip.text import tokenizers

_START_SCALE = 2.6593  # log(1 / 0.07), the paper's start; the cost of a step does not depend on it


@dataclass(frozen=True)
class PlannedModel:
    """A model that is built, but not loaded, and the size of its images."""

    dual_encoder: DualEncoder
    source: Source | None  # what alignment starts from; None in pretraining
    image_size: int  # pixels

    def attach(self, run: PretrainConfig | AlignConfig) -> None:
        """Add adapters if the run trains adapters."""
        if isinstance(run, AlignConfig) and config.METHODS[run.align.method].adapters:
            new_text = run.model.text_encoder != "same"
            lora.attach(self.dual_encoder.model, run.lora, new_text, run.model.seed)

    def begin(self, run: PretrainConfig | AlignConfig, stage: Stage) -> None:
        """Set what trains in a stage."""
        if isinstance(run, AlignConfig) and self.source is not None:
            METHODS[run.align.method].set_trainable(self.dual_encoder, run, stage, self.source)


def build(run: PretrainConfig | AlignConfig, device: torch.device) -> PlannedModel:
    """Return the model of a run on `device`, without adapters.

    Raises:
        ConfigError: a configuration cannot be read, or no stock class holds the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself gives them
        return _pretrained(run, device) if isinstance(run, PretrainConfig) else _aligned(run, device)


def _pretrained(run: PretrainConfig, device: torch.device) -> PlannedModel:
    tokenizer = _tokenizer(run)
    with device:
        model, processor = from_scratch(run.model, tokenizer)
    _give_scale(model)
    bias = losses.initial_bias(run.loss)
    images: Any = processor
    size = images.image_processor.crop_size["height"]
    return PlannedModel(DualEncoder(model, processor, bias), None, size)


def _tokenizer(run: PretrainConfig | AlignConfig) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer, or one of the size of a tokenizer that the run would train on its captions."""
    settings = run.tokenizer
    if settings.path is not None:
        return tokenizers.create(settings, iter(()), None)
    ends = ("<|startoftext|>", "<|endoftext|>")
    names = [f"piece{number}" for number in range(settings.vocab_size - len(ends))]
    vocab = {name: number for number, name in enumerate([*names, *ends])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=settings.max_tokens)


def _aligned(run: AlignConfig, device: torch.device) -> PlannedModel:
    with device:
        clip, image_size = _source(run.model)
    if is_stock(clip):
        _give_scale(clip)
    named = run.model.text_encoder
    if named == "same":
        if not is_stock(clip):
            text_encoder(run.model, clip)  # raises
        model: Any = clip
    else:
        with device:
            path = None if named is None else f"auto:{named.removeprefix('auto:')}"
            encoder = text_encoder(replace(run.model, text_encoder=path), clip) or new_text_tower(
                run.model, clip, _tokenizer(run)
            )
            model = swap_text_tower(clip, encoder, run.model.seed, text_pooling(run.model))
        _give_scale(model)
    checkpoint_gradients(model, run.model.image_gradient_checkpointing, run.model.text_gradient_checkpointing)
    processor: Any = SimpleNamespace(tokenizer=_fitting(model, run), image_processor=CLIPImageProcessor())
    return PlannedModel(DualEncoder(model, processor, losses.initial_bias(run.loss)), clip, image_size)


def _source(model_config: SwapConfig) -> tuple[Any, int]:
    """Return the model of `model.clip` from its configuration, and the size of its images, pixels."""
    if model_config.clip.startswith("open_clip:"):
        raise ConfigError(
            f"model.clip: got {model_config.clip}, but a plan reads configurations of transformers: name a CLIP of "
            "the same size, such as openai/clip-vit-base-patch32"
        )
    try:
        settings = AutoConfig.from_pretrained(model_config.clip, trust_remote_code=False)
        vision = getattr(settings, "vision_config", None)
        model = AutoModel.from_config(settings, dtype=torch.float32) if vision is not None else None
    except UNREADABLE as error:
        raise unreadable(model_config.clip, "model.clip", "config.json", error) from error
    if vision is not None and is_stock(model):
        return model, image_size_of(vision)
    tower, image_size = tower_config(f"auto:{model_config.clip}", 0)
    return AutoModel.from_config(tower, dtype=torch.float32).eval(), image_size


def _fitting(model: Any, run: AlignConfig) -> Any:
    """Return what a `DualEncoder` asks of a tokenizer, with the ids and the sizes of the text tower."""
    text = model.config.text_config
    last = text.vocab_size - 1
    return SimpleNamespace(
        pad_token_id=text.pad_token_id,
        eos_token_id=last if text.eos_token_id == tokenizers.LEGACY_EOS_ID else text.eos_token_id,
        model_max_length=run.tokenizer.max_tokens,
        get_vocab=lambda: {"last": last},
    )


def _give_scale(model: Any) -> None:
    """Give a model on the meta device a logit scale with a value, which `DualEncoder` reads."""
    path = layout_of(model).logit_scale
    shape = model.get_parameter(path).shape
    set_part(model, path, nn.Parameter(torch.full(shape, _START_SCALE)))
