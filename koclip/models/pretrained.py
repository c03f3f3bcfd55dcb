"""Load the models that training starts from: a CLIP or an image tower, and a text encoder.

Models are loaded in fp32, from safetensors, into stock classes: no pickles, no remote code. Loading fails on missing,
unexpected or mismatched weights. There are two exceptions: task heads are ignored, and a missing pooler, to which
transformers would give random weights, is replaced by a pooler that returns the class token
(`koclip.models.swap.linear_pooler`) or the text's first token (`koclip.models.first_token`).
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    ChineseCLIPModel,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    ProcessorMixin,
    TimmWrapperImageProcessor,
    VisionTextDualEncoderModel,
)

from koclip.config import ConfigError, check
from koclip.models.first_token import read_first_token, unfold
from koclip.models.router import Pooling, RouterConfig, RouterModel, tower_class
from koclip.models.stock import LAYOUTS, StockModel, is_stock, parts
from koclip.models.swap import linear_pooler
from koclip.text.tokenizers import COUNT_FROM_PADDING, READS_END, UNMASKED

UNREADABLE = (OSError, ValueError, ImportError, SafetensorError)  # errors that transformers raises
# Dual encoders whose text tower fits other image towers. `text_encoder: same` works for any `StockModel`.
TEXT_SOURCES = (CLIPModel, ChineseCLIPModel, VisionTextDualEncoderModel, RouterModel)
_OLD = "pooling_mode_{}"  # keys of Pooling before sentence-transformers 5.4
_CLIP, _TEXT = "model.clip", "model.text_encoder"  # configuration keys, for error messages


def load_image_side(path: str) -> tuple[StockModel | PreTrainedModel, Any]:
    """Load the model that gives the image space, and its image processor.

    Args:
        path: Directory or Hub id of a dual encoder (a class of `koclip.models.stock.LAYOUTS`: CLIP, ChineseCLIP,
            AltCLIP, MetaCLIP 2, SigLIP, SigLIP 2 with a fixed resolution, VisionTextDualEncoder), or of an image tower
            with a pooled output (B, W), for example google/vit-*, DINOv2 or a timm model.

    Returns:
        The stock dual encoder, or the image tower with W as its `config.hidden_size`; in evaluation mode.

    Raises:
        ConfigError: the model cannot be loaded, has missing or unexpected weights, or has no pooled output.
    """
    model, problems = read(path, _CLIP)
    if is_stock(model):
        refuse(path, _CLIP, model, problems)
        unfold(model)
        return model, _image_processor(path)
    if model.main_input_name != "pixel_values" or hasattr(model, "text_model"):
        raise ConfigError(
            f"{_CLIP}: {path} is a {type(model).__name__}, expected one of "
            f"{', '.join(layout.model_class.__name__ for layout in LAYOUTS)}, or an image tower: give another path "
            "(for SigLIP 2 a model with a fixed resolution, not NaFlex)"
        )
    if _lacks_only_the_pooler(model, problems) and hasattr(model.config, "pooler_act"):
        del problems["missing_keys"]
        linear_pooler(model)
    refuse(path, _CLIP, model, _without_heads(model, problems))
    processor = _image_processor(path)
    _set_width(path, model, processor)
    return model, processor


def load_text_encoder(path: str, seed: int = 0) -> PreTrainedModel:
    """Load a text encoder without its head.

    Args:
        path: Directory or Hub id of an encoder, or of a CLIP, whose text tower is used. `auto:<path or Hub id>` builds
            the encoder of that config.json with random weights.
        seed: Seed of the random weights.

    Raises:
        ConfigError: the encoder cannot be loaded, has missing or unexpected weights, or does not read text.
    """
    model: Any
    problems: dict[str, list[str]] = {}
    if path.startswith("auto:"):
        model = _from_config(path.removeprefix("auto:"), seed)
    else:
        model, problems = read(path, _TEXT)
    encoder: PreTrainedModel = model
    if isinstance(model, TEXT_SOURCES):
        refuse(path, _TEXT, model, problems)
        encoder = parts(model).text_tower
    elif hasattr(model, "vision_model") and hasattr(model, "text_model"):
        raise ConfigError(
            f"{_TEXT}: {path} is a {type(model).__name__}, a dual encoder whose text tower does not fit other models. "
            f"Expected a text encoder, or one of {', '.join(kind.__name__ for kind in TEXT_SOURCES)}"
        )
    fits = encoder.main_input_name == "input_ids"
    check(fits, _TEXT, path, f"a {type(encoder).__name__}, which does not read text: expected a text encoder")
    if _lacks_only_the_pooler(encoder, problems):
        del problems["missing_keys"]
        read_first_token(encoder)
    refuse(path, _TEXT, encoder, _without_heads(encoder, problems))
    _pad_as_the_tokenizer_beside_it(path.removeprefix("auto:"), encoder)
    return encoder


def own_pooling(path: str) -> Pooling | None:
    """Return the pooling that the directory or Hub repository of a text encoder says; None: it says nothing.

    Raises:
        ConfigError: a sentence-transformers model with another pooling.
    """
    path = path.removeprefix("auto:")
    config = _settings(path, "config.json")
    if config.get("model_type") == RouterConfig.model_type:
        return cast(Pooling, config["pooling"])
    modules = _settings(path, "modules.json")
    folders = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
    if not folders:
        return None
    settings = _settings(path, f"{folders[0]}/config.json")
    old = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    mode = settings.get("pooling_mode", old[0] if len(old) == 1 else old)
    known: dict[Any, Pooling] = {"cls": "first", "mean": "mean", _OLD.format("cls_token"): "first"}
    known |= {_OLD.format("mean_tokens"): "mean"}
    pooling = known.get(mode if isinstance(mode, str) else None)
    check(pooling is not None, "model.pooling", mode, f"of {path}: expected cls or mean; set model.pooling")
    return pooling


def take_padding(encoder: PreTrainedModel, pad_token_id: int | None) -> None:
    """Set the padding token of an encoder to the tokenizer's, and warn if it was another token.

    In models like multilingual-e5, config.json says 0, but the tokenizer (XLM-R's) pads with 1 and starts texts with 0.
    Padding is masked, so no embedding changes. But the padding token gets no gradient, and a `ChineseCLIPModel` loads
    its embedding as zeros. Encoders that count positions from the padding token are not changed.
    """
    config = encoder.config
    if pad_token_id in (None, config.pad_token_id) or config.model_type in (*COUNT_FROM_PADDING, *READS_END, *UNMASKED):
        return
    warnings.warn(
        f"text encoder: config.json of this {config.model_type} says pad_token_id {config.pad_token_id}, its tokenizer "
        f"pads with {pad_token_id}; koclip uses the tokenizer's, which changes no embedding",
        stacklevel=2,
    )
    config.pad_token_id = pad_token_id
    embeddings: Any = encoder.get_input_embeddings()
    embeddings.padding_idx = pad_token_id


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id and is not a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def read(path: str | Path, key: str, subfolder: str = "") -> tuple[Any, dict[str, list[str]]]:
    """Load a model in fp32 and evaluation mode. Also return the problems of its weights: kind of problem -> names.

    `key` is the configuration key of `path`, for error messages.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    try:
        kind: Any = AutoModel
        if key == _TEXT or subfolder:  # of a T5, the encoder alone
            kind = tower_class(AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=False))
        model, info = kind.from_pretrained(
            path,
            subfolder=subfolder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info` like other problems
            use_safetensors=True,
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise unreadable(path, key, "config.json and model.safetensors (of save_pretrained)", error) from error
    return model, {name: sorted(keys) for name, keys in info.items() if keys}


def refuse(path: str | Path, key: str, model: PreTrainedModel, problems: dict[str, list[str]]) -> None:
    """Raise a `ConfigError` if the weights have problems."""
    if problems:
        kind = type(model).__name__
        faults = "; ".join(f"{len(names)} {fault}, for example {names[0]}" for fault, names in problems.items())
        raise ConfigError(f"{key}: {path} does not have exactly the weights of a {kind}: {faults}; use another model")


def read_processor(path: str | Path, key: str) -> ProcessorMixin:
    """Load the image processor and the tokenizer of a dual encoder.

    Raises:
        ConfigError: a file is missing, or the processor needs remote code.
    """
    expected = "preprocessor_config.json (or processor_config.json) and a tokenizer's files"
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(path, key, expected, error) from error
    whole = isinstance(processor, ProcessorMixin) and hasattr(processor, "tokenizer")
    check(whole, key, str(path), f"it has a {type(processor).__name__} only, expected {expected} beside the model")
    return cast(ProcessorMixin, processor)


def unreadable(path: str | Path, key: str, expected: str, error: Exception) -> ConfigError:
    """Return the error for a path or Hub id that could not be loaded because of `error`."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").exists():
        return ConfigError(f"{key}: {path} is the directory of a run, expected its model: {folder / 'model'}")
    if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").exists():
        return ConfigError(f"{key}: {path} has the files of open_clip: expected open_clip:local-dir:{path}")
    if not folder.exists() and not is_hub_id(str(path)):
        return ConfigError(f"{key}: {path}: no such directory, and no Hub id, which has the form owner/name")
    place = "" if folder.is_dir() else "is not a local directory, and as a Hub id it "
    return ConfigError(
        f"{key}: {path} {place}cannot be loaded: {str(error).strip().splitlines()[0]} Expected {expected} of a stock "
        "class of transformers: no pickles, no remote code"
    )


def _settings(path: str, name: str) -> Any:
    """Return the content of a JSON file in a directory or Hub repository; {} without such a file.

    Raises:
        ConfigError: the file is damaged, or the Hub cannot be asked whether there is one.
    """
    try:
        file = Path(path, name) if Path(path).is_dir() else _hub_file(path, name)
        return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    except (*UNREADABLE, HfHubHTTPError) as error:
        raise unreadable(path, _TEXT, f"{name}, which says how it pools; or set model.pooling", error) from error


def _hub_file(repository: str, name: str) -> Path | None:
    """Return a file of a Hub repository in the cache; None if the repository does not have it."""
    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError:  # offline
        if try_to_load_from_cache(repository, name) is not _CACHED_NO_EXIST:
            raise
        return None
    except EntryNotFoundError:
        return None


def _lacks_only_the_pooler(model: PreTrainedModel, problems: dict[str, list[str]]) -> bool:
    pooler = {name for name in model.state_dict() if name.startswith("pooler.")}
    return bool(pooler) and set(problems.get("missing_keys", [])) == pooler


def _without_heads(model: PreTrainedModel, problems: dict[str, list[str]]) -> dict[str, list[str]]:
    left_over = [name for name in problems.get("unexpected_keys", []) if not _is_head(model, name)]
    others = {fault: names for fault, names in problems.items() if fault != "unexpected_keys"}
    return others | ({"unexpected_keys": left_over} if left_over else {})


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether an unexpected weight belongs to a task head: to no module, or to an identity (in timm models)."""
    if name.startswith("visual_projection."):  # belongs to the image space
        return False
    part = name.removeprefix(f"{model.base_model_prefix}.")
    tower = getattr(model, model.base_model_prefix, model)
    if part.split(".")[0] not in dict(tower.named_children()):
        return True
    modules = dict(tower.named_modules())
    return isinstance(modules.get(part.rpartition(".")[0]), nn.Identity)


def _pad_as_the_tokenizer_beside_it(path: str, encoder: PreTrainedModel) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE:
        return  # the tokenizer is elsewhere; `koclip.text.tokenizers.load` reports its errors
    empty = len(tokenizer) <= len(set(tokenizer.all_special_ids))  # a tokenizer built without files
    if not empty and len(tokenizer) <= encoder.config.vocab_size:
        take_padding(encoder, tokenizer.pad_token_id)


def _from_config(path: str, seed: int) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = getattr(config, "text_config", config)  # a dual encoder's text tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = tower_class(config)
            if kind is not AutoModel:
                return kind(config).eval()
            return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except UNREADABLE as error:
        raise unreadable(path, _TEXT, "the config.json", error) from error


def _set_width(path: str, tower: PreTrainedModel, processor: Any) -> None:
    """Check that a tower's pooled output is (B, W), and set W in its configuration, where the stock class reads it."""
    try:
        pixels = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            pooled = tower(pixel_values=pixels).pooler_output
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{_CLIP}: {path}, a {type(tower).__name__}, has no pooled output: {error}") from error
    shape = None if pooled is None else tuple(pooled.shape)
    fits = shape is not None and len(shape) == 2 and getattr(tower.config, "hidden_size", shape[1]) == shape[1]
    key = f"{_CLIP}: the pooled output of {path}, a {type(tower).__name__}"
    check(fits, key, shape, "expected (images, config.hidden_size): use another image tower")
    tower.config.hidden_size = pooled.shape[1]


def _image_processor(path: str) -> Any:
    try:
        processor: Any = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(path, _CLIP, "preprocessor_config.json", error) from error
    return _from_timm(path, processor.data_config) if isinstance(processor, TimmWrapperImageProcessor) else processor


def _from_timm(path: str, data: dict[str, Any]) -> CLIPImageProcessor:
    """Return an image processor equal to timm's, which cannot be saved. Crops with odd margins differ by a pixel."""
    _, height, width = data["input_size"]
    mode = data.get("crop_mode", "center")
    fits = height == width and mode in ("center", "squash")
    check(fits, f"{_CLIP}: {path}, crop", (mode, height, width), "expected a square, mode center or squash")
    side = math.floor(height / data["crop_pct"])
    return CLIPImageProcessor(
        size={"shortest_edge": side} if mode == "center" else {"height": side, "width": side},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
