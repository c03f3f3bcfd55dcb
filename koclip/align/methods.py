"""What each method of alignment does to a model. Its stages are in `koclip.config.METHODS`, under the same name.

A new method needs an entry in both tables; tests compare their names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, ProcessorMixin

from koclip.align import lora
from koclip.align.trainable import set_trainable
from koclip.config import AlignConfig, Stage
from koclip.models.dual_encoder import DualEncoder
from koclip.models.save import save_stock_model
from koclip.models.stock import StockModel

Source = StockModel | PreTrainedModel
Weights = dict[str, torch.Tensor]


class Method(NamedTuple):
    """What a method does to a model.

    Attributes:
        attach: Called once before training; returns what to print about it, if anything.
        set_trainable: Called at the start of each stage with the dual encoder, the configuration, the stage and the
            source.
        stock_weights: Called when the model is saved, with its directory, the model, its processor, its weights and the
            configuration; returns a dual encoder's weights without what `attach` added.
    """

    attach: Callable[[StockModel, AlignConfig], str | None]
    set_trainable: Callable[[DualEncoder, AlignConfig, Stage, Source], None]
    stock_weights: Callable[[Path, StockModel, ProcessorMixin, Weights, AlignConfig], Weights]


def _attach_adapters(model: StockModel, config: AlignConfig) -> str:
    lora.attach(model, config.lora, new_text=config.model.text_encoder != "same", seed=config.model.seed)
    return lora.report(model)


def _save_adapters(
    directory: Path, model: StockModel, processor: ProcessorMixin, weights: Weights, config: AlignConfig
) -> Weights:
    """Write the adapter, and with a new text encoder the model that it adapts; return the merged weights."""
    lora.save(model, weights, directory, config.model.clip, config.model.text_encoder)
    if config.model.text_encoder != "same":
        save_stock_model(directory.with_name(lora.BASE), model, processor, lora.base_weights(weights))
    return lora.merge(model, weights)


_WEIGHTS = Method(lambda model, config: None, set_trainable, lambda _, model, processor, weights, config: weights)
_ADAPTERS = Method(_attach_adapters, lambda *_: None, _save_adapters)  # PEFT has set what trains

METHODS = {
    "frozen_image": _WEIGHTS,
    "full": _WEIGHTS,
    "distill": _WEIGHTS,
    "two_stage": _WEIGHTS,
    "lora": _ADAPTERS,
}
