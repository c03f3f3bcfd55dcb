"""Write the model that an alignment trained."""

from pathlib import Path

import torch
from transformers import ProcessorMixin

from koclip.align.methods import METHODS, Weights
from koclip.config import AlignConfig
from koclip.models.save import save_stock_model
from koclip.models.stock import StockModel


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
