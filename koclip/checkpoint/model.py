"""The published model directory: what `from_pretrained` of stock transformers loads."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from koclip.text.tokenizers import forget_call_state


def publish(
    directory: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: dict[str, torch.Tensor]
) -> None:
    """Write a stock model directory from a `DualEncoder`'s state dict."""
    if "logit_bias" in weights:
        model.config.logit_bias = weights["logit_bias"].item()
    stock = {
        name.removeprefix("model."): value.float() if value.is_floating_point() else value
        for name, value in weights.items()
        if name != "logit_bias"
    }
    stock["logit_scale"] = stock["logit_scale"].reshape(())  # of one dimension under FSDP2
    model.save_pretrained(directory, state_dict=stock)
    forget_call_state(processor.tokenizer)
    processor.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)  # preprocessor_config.json, which older readers look for
