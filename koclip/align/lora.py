"""LoRA and DoRA for a stock dual encoder, with PEFT. No other module uses PEFT.

The adapted layers are the linear layers (attention and MLP) inside a tower's numbered layers. A new text projection,
which has random weights, is trained fully. All other weights are frozen, also the image projection and the logit scale.
The model keeps its class, its configuration and its methods. Only its state dict has other names; `merge` returns the
stock names.
"""

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from koclip import storage
from koclip.config import AdapterConfig, check
from koclip.models.first_token import fold
from koclip.models.pretrained import is_hub_id
from koclip.models.stock import StockModel

FOLDER, FILE = "adapter", "adapter_base.json"
SAME = "same"


@dataclass(frozen=True)
class AdapterBase:
    """The base model of an adapter, as in adapter_base.json. Local directories are None."""

    base_model: str | None  # Hub id of `model.clip`
    text_encoder: str | None  # Hub id of `model.text_encoder`; `same` if the base keeps its text tower
    method: str  # LoRA or DoRA

    @property
    def is_built(self) -> bool:
        """Whether koclip built the base from two models. Then it is in no repository."""
        return self.text_encoder != SAME

    @property
    def unnamed(self) -> list[str]:
        """The configuration keys without a known Hub id."""
        ids = {"model.clip": self.base_model, "model.text_encoder": self.text_encoder}
        return [key for key, hub_id in ids.items() if hub_id is None]

    def write(self, folder: Path) -> None:
        """Write adapter_base.json into the folder adapter/."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        storage.replace_text(folder / FILE, text)


def read_base(folder: Path) -> AdapterBase | None:
    """Read adapter_base.json of the folder adapter/; None if it is missing or broken, or has other keys."""
    try:
        return AdapterBase(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


_TOWERS = {"text": ("text_model",), "image": ("vision_model",), "both": ("text_model", "vision_model")}
BASE = "adapter_base"  # folder beside model/, with the base of a swapped model's adapter
_FULL = re.compile(r"\.modules_to_save\.default\.")  # modules trained fully; `.original_module.` is their start
_README = """\
# Adapter

{kind} of rank {rank} on the {sides} tower of a `{model}`{full}. The merged model needs none of this.
To load the adapter with PEFT, from this folder:

```python
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base, ".")
```
"""
_SWAPPED = """\
from koclip.models.pretrained import load_image_side, load_text_encoder
from koclip.models.swap import swap_text_tower

base = swap_text_tower(load_image_side("{clip}")[0], load_text_encoder("{text_encoder}"){pooling})"""
_WHOLE = """\
from transformers import AutoModel

base = AutoModel.from_pretrained("{clip}")"""


def attach(model: StockModel, config: AdapterConfig, new_text: bool = True, seed: int = 0) -> None:
    """Freeze `model` and add adapters, in place. Untrained adapters do not change the outputs.

    Call it before `koclip.models.fast.speed_up`, and before the model is wrapped or moved. If the text projection is
    not `new_text`, it is frozen too.

    Raises:
        ConfigError: a tower has no linear layers to adapt.
    """
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules="|".join(_layers(model, tower) for tower in _TOWERS[config.target]),
        modules_to_save=["text_projection"] if new_text else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        without_values = any(weight.is_meta for weight in model.parameters())  # neither have the adapters
        inject_adapter_in_model(lora, model, low_cpu_mem_usage=without_values)


def merge(model: StockModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the stock weights with adapters merged, in fp32. `model` has adapters, and is not changed.

    `state_dict` has the weights of the model, of its moving average, or of its `DualEncoder`, whose names are kept.
    """
    weights = {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}
    layers = [name.removesuffix(".base_layer.weight") for name in weights if name.endswith(".base_layer.weight")]
    for layer in layers:
        parts = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{layer}.")}
        tensors = {name.removeprefix(f"{layer}."): value for name, value in parts.items()}
        weights |= {f"{layer}.{name}": value for name, value in _merged(_config(model), tensors).items()}
    for name in [name for name in weights if _FULL.search(name)]:
        weights[_FULL.sub(".", name)] = weights.pop(name)
        del weights[_FULL.sub(".original_module.", name)]
    return weights


def base_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the stock weights before adaptation, from the `state_dict` of `merge`."""
    weights = {}
    for name, value in state_dict.items():
        stock = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if not _FULL.search(name) and not any(f".{part}" in name for part in LoraLayer.adapter_layer_names):
            weights[stock] = value
    return weights


def save(
    model: StockModel,
    state_dict: dict[str, torch.Tensor],
    directory: Path,
    clip: str,
    text_encoder: str | None = SAME,
) -> None:
    """Write the adapter alone to `directory`/adapter, in PEFT's format, in safetensors.

    adapter_config.json names the base and its class, so that `AutoPeftModel` and `AutoModel` load the folder. A local
    base is named by its path, which `koclip.publishing.checks.name_base` replaces. adapter_base.json names the base
    without paths. `clip` and `text_encoder` are the configuration's `model.clip` and `model.text_encoder`. If the text
    encoder is new, the base is in the folder `BASE` beside `directory`; the caller writes it with `base_weights`.
    """
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(_file(model, state_dict))
    config = copy.copy(_config(model))
    clip_id = clip if is_hub_id(clip) else None
    encoder_id = text_encoder if text_encoder == SAME or is_hub_id(text_encoder or "") else None
    base = AdapterBase(clip_id, encoder_id, _kind(config))
    base.write(folder)
    config.base_model_name_or_path = base.base_model or str(Path(clip).resolve())
    if base.is_built:
        config.base_model_name_or_path = str(directory.resolve().with_name(BASE))
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.inference_mode = True
    config.save_pretrained(folder)
    sides = [side for side in ("text", "image") if _TOWERS[side][0] in config.target_modules]
    names = {"clip": base.base_model or "<model.clip>", "text_encoder": base.text_encoder or "<model.text_encoder>"}
    names["pooling"] = ', pooling="mean"' if getattr(model.config, "pooling", None) == "mean" else ""
    text = _README.format(
        kind=base.method,
        rank=config.r,
        sides=" and the ".join(sides),
        full="".join(f" and the whole {name}" for name in config.modules_to_save or []),
        model=type(model).__name__,
        base=(_SWAPPED if base.is_built else _WHOLE).format(**names),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def report(model: StockModel) -> str:
    """Return one line with the number and the size of the adapters. Call it before the model is sharded."""
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    size = len(_file(model, model.state_dict()))
    return (
        f"{_kind(_config(model))}: {layers} modules, trainable {trained:,} of {total:,} parameters "
        f"({trained / total:.2%}), adapter file {size / 1000:,.0f} kB"
    )


def _layers(model: StockModel, tower: str) -> str:
    """Return a pattern that matches the linear layers inside a tower's numbered layers."""
    numbered = re.compile(rf"{tower}\..*\.\d+\.(.+)")
    # No subclasses: nn.MultiheadAttention reads the weight of its output projection and would ignore an adapter.
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    tails = {match[1] for name in linear if (match := numbered.fullmatch(name))}
    side = {"text_model": "text", "vision_model": "image"}[tower]
    kind = type(getattr(model, tower)).__name__
    check(bool(tails), "lora.target", side, f"a {kind} has no linear layers to adapt: use another target")
    return rf"{tower}\..*\.\d+\.({'|'.join(re.escape(tail) for tail in sorted(tails))})"


def _merged(config: LoraConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge a layer in a copy on the CPU. The model itself may be sharded or on a GPU."""
    width_out, width_in = tensors["base_layer.weight"].shape
    alone = copy.copy(config)
    alone.target_modules, alone.modules_to_save = ["layer"], None
    with torch.random.fork_rng(devices=[]):
        module = nn.ModuleDict({"layer": nn.Linear(width_in, width_out, bias="base_layer.bias" in tensors)})
        inject_adapter_in_model(alone, module)
    layer: Any = module["layer"]
    layer.load_state_dict(tensors)
    layer.merge(safe_merge=True)
    return {name: value.detach() for name, value in layer.base_layer.state_dict().items()}


def _file(model: StockModel, state_dict: dict[str, torch.Tensor]) -> bytes:
    stock = {name.removeprefix("model."): value for name, value in state_dict.items()}
    adapter = get_peft_model_state_dict(model, fold(model, stock))
    weights = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in adapter.items()}
    # PEFT reads DoRA's magnitudes with or without the suffix `.weight`, transformers only with it.
    magnitudes = [name for name in weights if name.endswith(".lora_magnitude_vector")]
    weights |= {f"{name}.weight": weights.pop(name) for name in magnitudes}
    return safetensors.torch.save(weights, metadata={"format": "pt"})


def _config(model: StockModel) -> Any:
    return model.peft_config["default"]


def _kind(config: LoraConfig) -> str:
    return "DoRA" if config.use_dora else "LoRA"
