"""Load what training starts from: a CLIP or an image tower whose image space stays, and a text encoder.

Everything is loaded in fp32, from safetensors, into stock classes: no pickles, no remote code. Loading fails on
missing, unexpected or mismatched weights. There are two exceptions: task heads are ignored, and a missing pooler, which
transformers would draw at random, is replaced:

- of image towers (google/vit-*) by one that returns the class token (`koclip.models.swap.linear_pooler`);
- of text encoders (checkpoints of masked language models) by the tanh of the first token, after an identity. Only
  `VisionTextDualEncoderModel` uses it.
"""

import math
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
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
from koclip.models.stock import LAYOUTS, StockModel, is_stock, parts
from koclip.models.swap import linear_pooler
from koclip.text.tokenizers import COUNT_FROM_PADDING, READS_END, UNMASKED

UNREADABLE = (OSError, ValueError, ImportError, SafetensorError)  # what transformers raises
# Dual encoders whose text tower another image tower can take; `text_encoder: same` takes that of any `StockModel`.
GIVE_THEIR_TEXTS = (CLIPModel, ChineseCLIPModel, VisionTextDualEncoderModel)
_CLIP, _TEXT = "model.clip", "model.text_encoder"  # the keys that errors name


def load_image_side(path: str) -> tuple[StockModel | PreTrainedModel, Any]:
    """Load the model whose image space is kept, and its image processor.

    Args:
        path: Directory or Hub id of a dual encoder (a class of `koclip.models.stock.LAYOUTS`: CLIP, ChineseCLIP,
            AltCLIP, MetaCLIP 2, SigLIP and SigLIP 2 of one resolution, VisionTextDualEncoder), or of an image tower: a
            classifier's such as google/vit-*, DINOv2, timm, any whose pooled output is (B, W).

    Returns:
        The stock dual encoder, which has a text tower to learn from; or the image tower alone, with W as its
        `config.hidden_size`. Both in evaluation mode.

    Raises:
        ConfigError: nothing that can be loaded is there, weights are missing or left over, or it has no image space.
    """
    model, problems = read(path, _CLIP)
    if is_stock(model):
        refuse(path, _CLIP, model, problems)
        return model, _image_processor(path)
    if model.main_input_name != "pixel_values" or hasattr(model, "text_model"):
        raise ConfigError(
            f"{_CLIP}: {path} is a {type(model).__name__}; expected one of "
            f"{', '.join(layout.model_class.__name__ for layout in LAYOUTS)}, or an image tower: give another path (of "
            "SigLIP 2 one of a fixed resolution, not NaFlex)"
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
        path: Directory or Hub id of an encoder, or of a CLIP, whose text tower is taken; `auto:<path or Hub id>` gives
            the encoder of that config.json random weights.
        seed: Seed of the random weights.

    Raises:
        ConfigError: nothing that can be loaded is there, weights are missing or left over, or it reads no text.
    """
    model: Any
    problems: dict[str, list[str]] = {}
    if path.startswith("auto:"):
        model = _from_config(path.removeprefix("auto:"), seed)
    else:
        model, problems = read(path, _TEXT)
    encoder: PreTrainedModel = model
    if isinstance(model, GIVE_THEIR_TEXTS):
        refuse(path, _TEXT, model, problems)
        encoder = parts(model).text_tower
    elif hasattr(model, "vision_model") and hasattr(model, "text_model"):
        raise ConfigError(
            f"{_TEXT}: {path} is a {type(model).__name__}, a dual encoder whose text tower koclip cannot take. Give an "
            f"encoder of texts alone, or one of {', '.join(kind.__name__ for kind in GIVE_THEIR_TEXTS)}"
        )
    fits = encoder.main_input_name == "input_ids"
    check(fits, _TEXT, path, f"a {type(encoder).__name__}, which reads no text: expected a text encoder")
    if _lacks_only_the_pooler(encoder, problems):
        del problems["missing_keys"]
        _identity_pooler(encoder)
    refuse(path, _TEXT, encoder, _without_heads(encoder, problems))
    _pad_as_the_tokenizer_beside_it(path.removeprefix("auto:"), encoder)
    return encoder


def take_padding(encoder: PreTrainedModel, pad_token_id: int | None) -> None:
    """Set the padding token of an encoder to the tokenizer's; warn if it was another token.

    multilingual-e5 and its like are BERTs whose config.json says 0 beside a tokenizer of XLM-R's, which pads with 1 and
    begins texts with 0. Padding is masked, so no embedding changes; but the padding token gets no gradient, and a
    `ChineseCLIPModel` loads it as zeros. Encoders that count positions from the padding token are not changed.
    """
    config = encoder.config
    if pad_token_id in (None, config.pad_token_id) or config.model_type in (*COUNT_FROM_PADDING, *READS_END, *UNMASKED):
        return
    warnings.warn(
        f"text encoder: config.json of this {config.model_type} says pad_token_id {config.pad_token_id}, its tokenizer "
        f"pads with {pad_token_id}; koclip takes the tokenizer's, which changes no embedding",
        stacklevel=2,
    )
    config.pad_token_id = pad_token_id
    embeddings: Any = encoder.get_input_embeddings()
    embeddings.padding_idx = pad_token_id


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id and is no local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def read(path: str | Path, key: str, subfolder: str = "") -> tuple[Any, dict[str, list[str]]]:
    """Load a model in fp32 and evaluation mode; also return the faults of its weights: kind of fault -> names.

    Args:
        path: Directory or Hub id.
        key: The config key that errors name.
        subfolder: Where in the directory or repository the model lies.

    Raises:
        ConfigError: nothing that can be loaded is there.
    """
    try:
        model, info = AutoModel.from_pretrained(
            path,
            subfolder=subfolder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported like the others
            use_safetensors=True,
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise unreadable(path, key, "config.json and model.safetensors (save_pretrained makes them)", error) from error
    return model, {name: sorted(keys) for name, keys in info.items() if keys}


def refuse(path: str | Path, key: str, model: PreTrainedModel, problems: dict[str, list[str]]) -> None:
    """Raise a `ConfigError` if anything is wrong with the weights: the class and the file do not belong together."""
    if problems:
        kind = type(model).__name__
        raise ConfigError(f"{key}: {path} does not hold exactly the weights of a {kind}: {problems}; take another")


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
    check(whole, key, str(path), f"which has only a {type(processor).__name__}: expected {expected} beside the model")
    return cast(ProcessorMixin, processor)


def unreadable(path: str | Path, key: str, expected: str, error: Exception) -> ConfigError:
    """Return the error of a path or Hub id that gave `error` when it was loaded."""
    place = "" if Path(path).is_dir() else "is no directory here, and as a Hub id it "
    return ConfigError(
        f"{key}: {path} {place}cannot be loaded: {str(error).strip().splitlines()[0]} Expected {expected} of a stock "
        "class of transformers: no pickles, no remote code"
    )


def _lacks_only_the_pooler(model: PreTrainedModel, problems: dict[str, list[str]]) -> bool:
    pooler = {name for name in model.state_dict() if name.startswith("pooler.")}
    return bool(pooler) and set(problems.get("missing_keys", [])) == pooler


def _without_heads(model: PreTrainedModel, problems: dict[str, list[str]]) -> dict[str, list[str]]:
    left_over = [name for name in problems.get("unexpected_keys", []) if not _is_head(model, name)]
    others = {fault: names for fault, names in problems.items() if fault != "unexpected_keys"}
    return others | ({"unexpected_keys": left_over} if left_over else {})


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight that was left over is of a head: of no part of the model, or of a part timm left out."""
    if name.startswith("visual_projection."):  # part of the image space
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
        return  # it is elsewhere; `koclip.text.tokenizers.load` says what is wrong with it, and with other vocabularies
    empty = len(tokenizer) <= len(set(tokenizer.all_special_ids))  # what a class makes without files
    if not empty and len(tokenizer) <= encoder.config.vocab_size:
        take_padding(encoder, tokenizer.pad_token_id)


@torch.no_grad()
def _identity_pooler(text_encoder: PreTrainedModel) -> None:
    pooler: Any = text_encoder.pooler
    linear = getattr(pooler, "dense", pooler)  # ALBERT's and BigBird's are the linear layer itself
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)


def _from_config(path: str, seed: int) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = getattr(config, "text_config", config)  # of CLIP and the like: their text tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except UNREADABLE as error:
        raise unreadable(path, _TEXT, "the config.json", error) from error


def _set_width(path: str, tower: PreTrainedModel, processor: Any) -> None:
    """Make sure that a tower's pooled output is (B, W) and that its configuration says W, as the joint class reads."""
    try:
        pixels = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            pooled = tower(pixel_values=pixels).pooler_output
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{_CLIP}: {path}, a {type(tower).__name__}, has no pooled output: {error}") from error
    shape = None if pooled is None else tuple(pooled.shape)
    fits = shape is not None and len(shape) == 2 and getattr(tower.config, "hidden_size", shape[1]) == shape[1]
    check(
        fits,
        f"{_CLIP}: the pooled output of {path}, a {type(tower).__name__}",
        shape,
        "expected (images, config.hidden_size): take another image tower",
    )
    tower.config.hidden_size = pooled.shape[1]


def _image_processor(path: str) -> Any:
    try:
        processor: Any = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(path, _CLIP, "preprocessor_config.json", error) from error
    return _from_timm(path, processor.data_config) if isinstance(processor, TimmWrapperImageProcessor) else processor


def _from_timm(path: str, data: dict[str, Any]) -> CLIPImageProcessor:
    """Return a processor that does what timm's does, which cannot be saved; crops of odd margins differ by a pixel."""
    _, height, width = data["input_size"]
    mode = data.get("crop_mode", "center")
    fits = height == width and mode in ("center", "squash")
    check(fits, f"{_CLIP}: {path}, crop", (mode, height, width), "expected a square, centered or squashed")
    side = math.floor(height / data["crop_pct"])
    return CLIPImageProcessor(
        size={"shortest_edge": side} if mode == "center" else {"height": side, "width": side},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
