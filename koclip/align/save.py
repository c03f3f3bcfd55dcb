"""Write the model that an alignment trained."""

from pathlib import Path

import torch
from transformers import ProcessorMixin

from koclip.align import lora
from koclip.config import AlignConfig
from koclip.models import StockModel
from koclip.models.save import save_stock_model


def publish_aligned(
    directory: Path,
    model: StockModel,
    processor: ProcessorMixin,
    weights: dict[str, torch.Tensor],
    config: AlignConfig,
    source: dict[str, torch.Tensor],
) -> None:
    """Write what an alignment made: adapters in `adapter/` and merged, or weights averaged with the source's.

    With a new text encoder, what the adapters adapt is a model of its own in the folder `lora.BASE` beside it.

    Args:
        directory: Where to.
        model: The trained model, with adapters where the method is `lora`.
        processor: Its processor.
        weights: Its `DualEncoder`'s state dict.
        config: The run's.
        source: The stock weights that training began with, if they are averaged with.
    """
    if config.align.method == "lora":
        lora.save(model, weights, directory, config.model.clip, config.model.text_encoder)
        if config.model.text_encoder != "same":
            save_stock_model(directory.with_name(lora.BASE), model, processor, lora.base_weights(weights))
        weights = lora.merge(model, weights)
    new_text = config.model.text_encoder != "same"
    for name, before in source.items():
        if before.is_floating_point() and not (new_text and name.startswith("text_")):
            after = weights[f"model.{name}"]
            weights[f"model.{name}"] = torch.lerp(before.to(after).reshape(after.shape), after, config.align.wise_ft)
    save_stock_model(directory, model, processor, weights)
