"""The published model directory: what `from_pretrained` of stock transformers loads."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from koclip.config import AlignConfig
from koclip.models import StockModel, adapters
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
    _let_transformers_4_read(directory / "tokenizer_config.json")
    processor.image_processor.save_pretrained(directory)  # preprocessor_config.json, which older readers look for


def publish_aligned(
    directory: Path,
    model: StockModel,
    processor: ProcessorMixin,
    weights: dict[str, torch.Tensor],
    config: AlignConfig,
    source: dict[str, torch.Tensor],
) -> None:
    """Write what an alignment made: adapters in `adapter/` and merged, or weights averaged with the source's.

    Args:
        directory: Where to.
        model: The trained model, with adapters where the method is `lora`.
        processor: Its processor.
        weights: Its `DualEncoder`'s state dict.
        config: The run's.
        source: The stock weights that training began with, if they are averaged with.
    """
    if config.align.method == "lora":
        adapters.save(model, weights, directory, config.model.clip, config.model.text_encoder)
        weights = adapters.merge(model, weights)
    new_text = config.model.text_encoder != "same"
    for name, before in source.items():
        if before.is_floating_point() and not (new_text and name.startswith("text_")):
            after = weights[f"model.{name}"]
            weights[f"model.{name}"] = torch.lerp(before.to(after).reshape(after.shape), after, config.align.wise_ft)
    publish(directory, model, processor, weights)


def _let_transformers_4_read(settings: Path) -> None:
    """Write the old names of what transformers 4 knows and 5 has renamed; 5 reads both."""
    values = json.loads(settings.read_text(encoding="utf-8"))
    if values["tokenizer_class"] == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):  # a dictionary in transformers 4
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    settings.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
