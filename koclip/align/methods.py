"""What each method of alignment does to a model: before, during and after training.

Its stages are in `koclip.config.METHODS`, under the same name. A new method needs an entry in both tables; a test
compares their names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, ProcessorMixin

from koclip.align import lora
from koclip.config import AlignConfig, ConfigError, Stage
from koclip.models.dual_encoder import DualEncoder
from koclip.models.save import save_stock_model
from koclip.models.stock import StockModel, is_stock, parts
from koclip.optim import depth

Source = StockModel | PreTrainedModel
Weights = dict[str, torch.Tensor]


class Method(NamedTuple):
    """What a method does to a model.

    Attributes:
        attach: Called once before training; returns what to print about it, if anything.
        set_trainable: Called at the start of each stage with the dual encoder, the configuration, the stage and the
            source.
        stock_weights: Called when the model is saved, with its directory, the model, its processor, its weights and the
            configuration; returns a dual encoder's weights without the parts that `attach` added.
    """

    attach: Callable[[StockModel, AlignConfig], str | None]
    set_trainable: Callable[[DualEncoder, AlignConfig, Stage, Source], None]
    stock_weights: Callable[[Path, StockModel, ProcessorMixin, Weights, AlignConfig], Weights]


def set_trainable(encoder: DualEncoder, config: AlignConfig, stage: Stage, clip: Source) -> None:
    """Set `requires_grad` for a stage that trains weights. Adapters need no such call: PEFT sets it.

    Args:
        encoder: The dual encoder.
        config: The method, and how many layers of the image tower it trains.
        stage: The stage.
        clip: The source. Its logit scale is trained if the image tower is. The scale of a model whose source is an
            image tower alone is new, and is trained.

    Raises:
        ConfigError: the image tower has fewer layers than `align.image_layers` names.
    """
    model = parts(encoder.model)
    for module in (model.text_tower, model.text_projection):
        module.requires_grad_(True)
    model.image_projection.requires_grad_(stage.trains_image)
    contrasted = stage.images or bool(stage.distill and stage.distill.contrastive)
    model.logit_scale.requires_grad_(contrasted and (stage.trains_image or not is_stock(clip)))
    if encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(contrasted)
    depths, top = depth(model.image_tower), config.align.image_layers
    if top is not None and top >= max(depths.values()):
        most = max(depths.values()) - 1
        raise ConfigError(f"align.image_layers: got {top}, the image tower has {most} layers; leave it out for all")
    for name, parameter in model.image_tower.named_parameters():
        trained = stage.trains_image and (top is None or depths[name] <= top)
        # DDP stops at parameters without a gradient: the mask token belongs to masked-image training.
        parameter.requires_grad_(trained and not name.endswith("mask_token"))


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


class AlignedModelWriter:
    """Writes the stock model that a method trained: adapters merged, or weights averaged with those it began with.

    Adapters are in `adapter/` too. With a new text encoder, the model that they adapt is in the folder
    `koclip.align.lora.BASE` beside the model.

    Args:
        config: The run's.
        model: The model before training, without adapters. Its weights are copied if `align.wise_ft` averages them.
    """

    def __init__(self, config: AlignConfig, model: StockModel) -> None:
        self._config = config
        start = model.state_dict().items() if config.align.wise_ft < 1 else ()
        self._start = {name: value.clone() for name, value in start}

    def __call__(self, directory: Path, model: StockModel, processor: ProcessorMixin, weights: Weights) -> None:
        """Write the trained model.

        Args:
            directory: Where to write.
            model: The trained model, with adapters if the method trains them.
            processor: Its processor.
            weights: Its `DualEncoder`'s state dict.
        """
        config = self._config
        weights = METHODS[config.align.method].stock_weights(directory, model, processor, weights, config)
        new_text = config.model.text_encoder != "same"
        for name, before in self._start.items():
            if before.is_floating_point() and not (new_text and name.startswith("text_")):
                after = weights[f"model.{name}"]
                weights[f"model.{name}"] = torch.lerp(
                    before.to(after).reshape(after.shape), after, config.align.wise_ft
                )
        save_stock_model(directory, model, processor, weights)
