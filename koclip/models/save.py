"""The published model directory: what `from_pretrained` of stock transformers loads."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from koclip.models.stock import layout_of, longest_text, parts, positions, set_part
from koclip.text.tokenizers import forget_call_state

# Names in transformers 4. Its `ChineseCLIPProcessor` takes only BERT's tokenizer and does not resize by the shorter
# side. Its `CLIPProcessor` takes any tokenizer and does what `ChineseCLIPProcessor` does in transformers 5.
_NAMES_IN_4 = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "ChineseCLIPProcessor": "CLIPProcessor",
    "ChineseCLIPImageProcessor": "CLIPImageProcessor",
}


def save_stock_model(
    directory: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: dict[str, torch.Tensor]
) -> None:
    """Write a stock model directory from a `DualEncoder`'s state dict.

    It has as many positions for texts as the longest text of the tokenizer, the length of texts in training. Every
    class fails on a longer text that nobody cuts.
    """
    layout = layout_of(model)
    if "logit_bias" in weights:
        set_part(model, layout.logit_bias, weights["logit_bias"].item())
    stock = {
        name.removeprefix("model."): value.float() if value.is_floating_point() else value
        for name, value in weights.items()
        if name != "logit_bias"
    }
    stock[layout.logit_scale] = stock[layout.logit_scale].reshape(())  # of one dimension under FSDP2
    _cut_positions(model, stock, processor.tokenizer)
    stock = {_name_for_all(model, name): value for name, value in stock.items()}
    model.save_pretrained(directory, state_dict=stock)
    forget_call_state(processor.tokenizer)
    processor.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)  # preprocessor_config.json, which older readers look for
    _let_transformers_4_read(directory)


def _cut_positions(model: Any, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep as many positions of the text tower as the longest text has tokens, in its configuration and `weights`."""
    layout, tower = layout_of(model), parts(model).text_tower
    longest = longest_text(tokenizer, tower)
    for table, rows in positions(tower).items():
        name = f"{layout.text_tower}.{table}.weight"
        weights[name] = weights[name][: rows.start + longest]
        set_part(model, layout.num_positions, rows.start + longest)


def _name_for_all(model: Any, name: str) -> str:
    """Return the name under which every version of transformers reads a weight.

    Inside of a `VisionTextDualEncoderModel`, early versions (5.5 is one, 5.10 none) look for the weights of these
    towers one level deeper, and draw at random what they do not find. Later ones read both.
    """
    side, _, rest = name.partition(".")
    layout = layout_of(model)
    is_tower = side in (layout.image_tower, layout.text_tower)
    nested = is_tower and model.get_submodule(side).config.model_type in layout.nested_towers
    if not nested or rest.startswith(f"{side}."):
        return name
    return f"{side}.{side}.{rest}"


def _let_transformers_4_read(directory: Path) -> None:
    """Write the old names of what transformers 4 knows and 5 has renamed; 5 reads both."""
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        values = _renamed(json.loads((directory / name).read_text(encoding="utf-8")))
        if isinstance(values.get("extra_special_tokens"), list):  # a dictionary in transformers 4
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a file of settings with the names of classes that transformers 4 has."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("tokenizer_class", "processor_class", "image_processor_type"):
            value = _NAMES_IN_4.get(value, value)
        renamed[key] = _renamed(value) if isinstance(value, dict) else value
    return renamed
