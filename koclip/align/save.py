"""Write the model that an alignment trained."""

from pathlib import Path

import torch
from transformers import ProcessorMixin

from koclip.align.methods import METHODS, Weights
from koclip.config import AlignConfig
from koclip.models import StockModel
from koclip.models.save import publish


def starting_weights(model: StockModel, config: AlignConfig) -> Weights:
    """Return a copy of the weights that training begins with, if they are averaged with the trained ones."""
    return {name: value.clone() for name, value in model.state_dict().items()} if config.align.wise_ft < 1 else {}


def save_aligned_model(
    directory: Path, model: StockModel, processor: ProcessorMixin, weights: Weights, config: AlignConfig, start: Weights
) -> None:
    """Write the stock model that a method trained: adapters merged, or weights averaged with those it began with.

    Adapters are in `adapter/` too. With a new text encoder, the model that they adapt is in the folder
    `koclip.align.lora.BASE` beside `directory`.

    Args:
        directory: Where to write.
        model: The trained model, with adapters if the method trains them.
        processor: Its processor.
        weights: Its `DualEncoder`'s state dict.
        config: The run's.
        start: As `starting_weights` returned them.
    """
    weights = METHODS[config.align.method].stock_weights(directory, model, processor, weights, config)
    new_text = config.model.text_encoder != "same"
    for name, before in start.items():
        if before.is_floating_point() and not (new_text and name.startswith("text_")):
            after = weights[f"model.{name}"]
            weights[f"model.{name}"] = torch.lerp(before.to(after).reshape(after.shape), after, config.align.wise_ft)
    publish(directory, model, processor, weights)
