"""LoRA and DoRA for a stock dual encoder, by PEFT. Nothing else knows PEFT.

The adapted layers are the linear ones inside a tower's numbered layers: attention and MLP. A text projection that is
new, thus random, is trained fully; so is the pooler in front of it, where the class uses one and the text tower is
adapted. All else is frozen, the image space's projection and the logit scale too. The model keeps its class, its
configuration and its methods; only its state dict has other names, which `merge` turns back into stock ones.
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
from koclip.models.pretrained import is_hub_id
from koclip.models.stock import StockModel

FOLDER, FILE = "adapter", "adapter_base.json"
SAME = "same"


@dataclass(frozen=True)
class AdapterBase:
    """The base of an adapter.

    Args:
        base_model: Hub id of `model.clip`; None if that was a local directory.
        text_encoder: Hub id of `model.text_encoder`; `same` if the base keeps its text tower; None if that was a local
            directory.
        method: `LoRA` or `DoRA`.
    """

    base_model: str | None
    text_encoder: str | None
    method: str

    @property
    def is_built(self) -> bool:
        """Whether koclip built the base from two models, so that no repository holds it."""
        return self.text_encoder != SAME

    @property
    def unnamed(self) -> list[str]:
        """The configuration keys whose Hub ids are not known."""
        ids = {"model.clip": self.base_model, "model.text_encoder": self.text_encoder}
        return [key for key, hub_id in ids.items() if hub_id is None]

    def write(self, folder: Path) -> None:
        """Write the file into `folder`, which is adapter/."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        storage.replace_text(folder / FILE, text)


def read_base(folder: Path) -> AdapterBase | None:
    """Read the file of `folder`, which is adapter/; return None if it is missing, broken or of other keys."""
    try:
        return AdapterBase(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


_TOWERS = {"text": ("text_model",), "image": ("vision_model",), "both": ("text_model", "vision_model")}
BASE = "adapter_base"  # folder beside a model's, with what a swapped model's adapter adapts
_FULL = re.compile(r"\.modules_to_save\.default\.")  # what is trained fully beside `.original_module.`, its start
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

base = swap_text_tower(load_image_side("{clip}")[0], load_text_encoder("{text_encoder}"))"""
_WHOLE = """\
from transformers import AutoModel

base = AutoModel.from_pretrained("{clip}")"""


def attach(model: StockModel, config: AdapterConfig, new_text: bool = True, seed: int = 0) -> None:
    """Freeze `model` and put adapters into it, in place. At first they change nothing.

    Call it before `koclip.models.fast.speed_up` and before the model is wrapped or moved.

    Args:
        model: The dual encoder.
        config: Which towers, and how.
        new_text: Whether the text projection is new; if not, it is frozen like the rest.
        seed: Seed of the adapters' random half.

    Raises:
        ConfigError: a chosen tower has no linear layers to adapt.
    """
    full = ["text_projection"] if new_text else []
    if new_text and config.target != "image" and getattr(model.text_model, "pooler", None) is not None:
        full.append("text_model.pooler")
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules="|".join(_layers(model, tower) for tower in _TOWERS[config.target]),
        modules_to_save=full or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)


def merge(model: StockModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the stock weights that do what `state_dict` does, adapters merged in fp32. `model` stays as it is.

    Args:
        model: The model that adapters were attached to.
        state_dict: Its weights, or an average's, or gathered ones; of a `DualEncoder` too, whose names stay.
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
    """Return the stock weights that adapters were attached to, from the `state_dict` that `merge` takes."""
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
    """Write the adapter alone to `directory`/adapter, as PEFT loads it, in safetensors.

    adapter_config.json names the base and its class, so that `AutoPeftModel` and `AutoModel` load the folder. If the
    base is on this machine it is named by its path, which `koclip.publishing.checks.name_base` replaces.
    adapter_base.json says what the base is, without paths.

    Args:
        model: The model that adapters were attached to.
        state_dict: As for `merge`.
        directory: Where the folder `adapter` comes to be. With a new text encoder, the base is the model in the folder
            `BASE` beside it, which is to be written with `base_weights`.
        clip: Directory or Hub id of what the base is built from (`model.clip`).
        text_encoder: The same of its text encoder (`model.text_encoder`); `same` if `clip` as it is was adapted.
    """
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(_file(model, state_dict))
    config = copy.copy(_config(model))
    encoder_id = SAME if text_encoder == SAME else _hub_id(text_encoder or "")
    base = AdapterBase(_hub_id(clip), encoder_id, _kind(config))
    base.write(folder)
    config.base_model_name_or_path = base.base_model or str(Path(clip).resolve())
    if base.is_built:
        config.base_model_name_or_path = str(directory.resolve().with_name(BASE))
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.inference_mode = True
    config.save_pretrained(folder)
    sides = [side for side in ("text", "image") if _TOWERS[side][0] in config.target_modules]
    names = {"clip": base.base_model or "<model.clip>", "text_encoder": base.text_encoder or "<model.text_encoder>"}
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
    """Return one line on the adapters' number and size. Call it before the model is sharded."""
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    size = len(_file(model, model.state_dict()))
    return (
        f"{_kind(_config(model))}: {layers} modules, trainable {trained:,} of {total:,} parameters "
        f"({trained / total:.2%}), adapter file {size / 1000:,.0f} kB"
    )


def _layers(model: StockModel, tower: str) -> str:
    """Return a pattern of the linear layers inside a tower's numbered layers: tower, any number, names behind it."""
    numbered = re.compile(rf"{tower}\..*\.\d+\.(.+)")
    # Not subclasses: nn.MultiheadAttention reads its output projection's weight and would pass the adapter by.
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    tails = {match[1] for name in linear if (match := numbered.fullmatch(name))}
    side = {"text_model": "text", "vision_model": "image"}[tower]
    kind = type(getattr(model, tower)).__name__
    check(bool(tails), "lora.target", side, f"a {kind} has no linear layers that could be adapted: take another")
    return rf"{tower}\..*\.\d+\.({'|'.join(re.escape(tail) for tail in sorted(tails))})"


def _merged(config: LoraConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge one layer in a copy of its own, on the CPU: whatever `model` is, sharded or on a GPU, it is not needed."""
    width_out, width_in = tensors["base_layer.weight"].shape
    alone = copy.copy(config)
    alone.target_modules, alone.modules_to_save = ["layer"], None
    with torch.random.fork_rng(devices=[]):
        box = nn.ModuleDict({"layer": nn.Linear(width_in, width_out, bias="base_layer.bias" in tensors)})
        inject_adapter_in_model(alone, box)
    layer: Any = box["layer"]
    layer.load_state_dict(tensors)
    layer.merge(safe_merge=True)
    return {name: value.detach() for name, value in layer.base_layer.state_dict().items()}


def _file(model: StockModel, state_dict: dict[str, torch.Tensor]) -> bytes:
    stock = {name.removeprefix("model."): value for name, value in state_dict.items()}
    adapter = get_peft_model_state_dict(model, stock)
    weights = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in adapter.items()}
    # PEFT reads DoRA's magnitudes under the name that it writes and under their own; transformers only under that one.
    magnitudes = [name for name in weights if name.endswith(".lora_magnitude_vector")]
    weights |= {f"{name}.weight": weights.pop(name) for name in magnitudes}
    return safetensors.torch.save(weights, metadata={"format": "pt"})


def _config(model: StockModel) -> Any:
    return model.peft_config["default"]


def _kind(config: LoraConfig) -> str:
    return "DoRA" if config.use_dora else "LoRA"


def _hub_id(name: str) -> str | None:
    return name if is_hub_id(name) else None
