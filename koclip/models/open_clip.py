"""Convert checkpoints of open_clip to stock classes of transformers that compute the same embeddings.

| image tower | text tower | class |
|---|---|---|
| open_clip's ViT that reads its class token | causal, reads the largest id (OpenAI, LAION, DataComp) | `CLIPModel` |
| the same | causal, reads the end token (MetaCLIP 2) | `MetaClip2Model` |
| timm's ViT with attention pooling | no mask, reads the last token (SigLIP, SigLIP 2) | `SiglipModel` |

A setting that none of these classes has is refused by its name, and so are missing and unexpected weights. Settings and
names of weights: open_clip/model.py (`CLIPVisionCfg`, `CLIPTextCfg`), transformer.py, timm_model.py and tokenizer.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from koclip import distributed, storage
from koclip.config import ConfigError, check, peer
from koclip.models import open_clip_towers
from koclip.models.stock import layout_of, save_stock_model, set_part
from koclip.text import open_clip as tokenizers

PREFIX = "open_clip:"
_HUB, _LOCAL = "hf-hub:", "local-dir:"
FORM = (
    "open_clip:<model name>@<pretrained tag or file.safetensors>, open_clip:hf-hub:<Hub id> or "
    "open_clip:local-dir:<directory>"
)
_SPEC = "converted_from.txt"  # beside a converted model
_KEY = "model.clip"  # configuration key, for error messages
_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy"}


class Spec(NamedTuple):
    """Parts of a name of an open_clip model."""

    name: str  # `hf-hub:<Hub id>`, `local-dir:<directory>`, or the name of one of open_clip's configurations
    weights: str  # pretrained tag or file; empty for a Hub id or a directory


class Files(NamedTuple):
    """What a checkpoint consists of."""

    model: dict[str, Any]  # `model_cfg`: the arguments of open_clip's model classes
    preprocess: dict[str, Any]  # `preprocess_cfg`, without the settings that have their default value
    weights: Path
    tokenizer: str | None  # directory or Hub id of a tokenizer of transformers; None: open_clip's own BPE


def parse(spec: str, key: str) -> Spec:
    """Return the parts of a spec of the form `FORM`; `key` is its configuration key, for error messages.

    Raises:
        ConfigError: the spec names no weights, or a pickle.
    """
    name, _, weights = spec.removeprefix(PREFIX).partition("@")
    check(name.startswith((_HUB, _LOCAL)) != bool(weights), key, spec, f"expected {FORM}")
    is_file = Path(weights).suffix in _PICKLES or Path(weights).is_file()
    safe = not is_file or Path(weights).suffix == ".safetensors"
    check(safe, key, spec, "expected a pretrained tag or a .safetensors file: no pickles")
    return Spec(name, weights)


def hub_id(spec: str) -> str | None:
    """Return the Hub id of a spec of open_clip, also that of a pretrained tag; None for local files and other names.

    Raises:
        ConfigError: the spec has a tag, and open_clip's package is missing or does not know it.
    """
    if not spec.startswith(PREFIX):
        return None
    name, _, weights = spec.removeprefix(PREFIX).partition("@")
    if name.startswith(_HUB):
        return name.removeprefix(_HUB)
    if not weights or Path(weights).suffix in {".safetensors", *_PICKLES} or Path(weights).is_file():
        return None
    return _repository(spec, _tag(spec, name, weights))


def stock_source(path: str, directory: Path) -> str:
    """Return where the stock files of `model.clip` are: `path`, or `directory` with a converted open_clip model.

    Every process calls it; the first process converts. A resumed run uses the directory again.

    Raises:
        ConfigError: the directory has another model; or see `convert`.
    """
    if not path.startswith(PREFIX):
        return path
    note = directory / _SPEC
    if distributed.rank() == 0 and directory.exists():
        before = note.read_text(encoding="utf-8") if note.is_file() else None
        fix = f"expected {path}: delete the directory"
        check(before == path, f"{_KEY}: {directory} was converted from", before, fix)
    elif distributed.rank() == 0:
        with storage.atomic(directory) as partial:
            convert(path, partial)
            storage.replace_text(partial / _SPEC, path)
    distributed.barrier()
    return str(directory)


def convert(spec: str, directory: Path) -> None:
    """Write the model that `spec` (`FORM`) names to `directory`, as a stock class with its processor, in fp32.

    Embeddings of the same pixels and ids differ from open_clip's by rounding only. Pixels differ by a pixel's shift if
    the margin of a crop is odd. Ids differ for texts with HTML entities or wrongly decoded characters, which open_clip
    repairs (ftfy).

    Raises:
        ConfigError: a file is missing or damaged, or no stock class computes the same as this model.
    """
    files = _read(spec)
    text: Mapping[str, Any] = files.model.get("text_cfg", {})
    tokenizer = tokenizers.load(spec, files.tokenizer, text)
    model: Any = open_clip_towers.build(spec, files.model, tokenizer)
    layout = layout_of(model)
    weights = open_clip_towers.renamed(_load(spec, files.weights))
    if not layout.has_bias_parameter and "logit_bias" in weights:
        set_part(model, layout.logit_bias, weights.pop("logit_bias").item())
    open_clip_towers.fill(spec, model, weights)
    images = _image_processor(spec, files.preprocess, model.config.vision_config.image_size)
    processor: Any = layout.processor_class
    save_stock_model(directory, model, processor(images, tokenizer), model.state_dict())


def _read(spec: str) -> Files:
    name, weights = parse(spec, _KEY)
    if weights:
        return _read_named(spec, name, weights)
    place = name.removeprefix(_LOCAL).removeprefix(_HUB)
    is_local = name.startswith(_LOCAL)
    try:
        settings = json.loads(_file(spec, place, is_local, _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{_KEY}: {_CONFIG} of {spec} is not JSON: {error}") from error
    check("model_cfg" in settings, f"{_KEY}: {_CONFIG} of {spec}", sorted(settings), "expected model_cfg")
    named = settings["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = place if is_local or not named else named
    if not named and not tokenizers.is_in(place):
        tokenizer = None
    path = _file(spec, place, is_local, *_WEIGHTS)
    return Files(settings["model_cfg"], settings.get("preprocess_cfg", {}), path, tokenizer)


def _read_named(spec: str, name: str, weights: str) -> Files:
    """Read one of open_clip's own configurations, which its package has, and weights from a file or the Hub."""
    model = peer("open_clip", f"{_KEY}: {spec}").get_model_config(name.replace("/", "-"))
    check(model is not None, _KEY, spec, "expected a model name of open_clip.list_models()")
    tokenizer = model["text_cfg"].get("hf_tokenizer_name")
    if Path(weights).is_file():
        return Files(model, {}, Path(weights), tokenizer)
    tag = _tag(spec, name, weights)
    model["quick_gelu"] = tag.get("quick_gelu", False) or model.get("quick_gelu", False)  # open_clip only warns
    return Files(model, tag, _file(spec, _repository(spec, tag), False, *_WEIGHTS), tokenizer)


def _tag(spec: str, name: str, weights: str) -> dict[str, Any]:
    """Return what open_clip's package says about a pretrained tag; {} if it does not know it."""
    tag: dict[str, Any] = peer("open_clip", f"{_KEY}: {spec}").get_pretrained_cfg(name.replace("/", "-"), weights)
    return tag


def _repository(spec: str, tag: Mapping[str, Any]) -> str:
    """Return the Hub id of a pretrained tag's weights.

    Raises:
        ConfigError: its weights are not on the Hub.
    """
    repository = "/".join(tag.get("hf_hub", "").split("/")[:2]).strip("/")
    expected = "expected a .safetensors file, or a pretrained tag of open_clip whose weights are on the Hub"
    check(bool(repository), _KEY, spec, expected)
    return repository


def _file(spec: str, place: str, is_local: bool, *names: str) -> Path:
    """Return the first of `names` that a directory or a Hub repository has.

    Raises:
        ConfigError: it has none of them.
    """
    reason = "no such file"
    for name in names:
        try:
            path = Path(place, name) if is_local else Path(hf_hub_download(place, name))
        except (HfHubHTTPError, OSError, ValueError) as error:  # OSError: offline; ValueError: not a Hub id
            reason = str(error).strip().splitlines()[0]
            if not isinstance(error, EntryNotFoundError):
                break
            continue
        if path.is_file():
            return path
    raise ConfigError(f"{_KEY}: {spec}: {place} has no {' or '.join(names)}: {reason}. Expected {FORM}: no pickles")


def _load(spec: str, path: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{_KEY}: {spec}: {path} is not a whole safetensors file: {error}") from error
    return {name.removeprefix("module."): value.float() for name, value in weights.items()}  # `module.`: of DDP


def _image_processor(spec: str, settings: Mapping[str, Any], image_size: int) -> Any:
    """Return the image processor of open_clip's `PreprocessCfg` (transform.py)."""
    mode, resample = settings.get("resize_mode") or "shortest", settings.get("interpolation") or "bicubic"
    where = f"{_KEY}: {spec}, preprocess_cfg"
    check(mode in ("shortest", "squash"), f"{where}.resize_mode", mode, "expected shortest or squash")
    check(resample in ("bicubic", "bilinear", "random"), f"{where}.interpolation", resample, "expected bicubic")
    side = {"height": image_size, "width": image_size}
    options: dict[str, Any] = {
        "resample": Image.Resampling.BILINEAR if resample == "bilinear" else Image.Resampling.BICUBIC
    }
    for key, name, default in (("mean", "image_mean", OPENAI_CLIP_MEAN), ("std", "image_std", OPENAI_CLIP_STD)):
        value = settings.get(key) or default
        options[name] = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if mode == "squash":
        return SiglipImageProcessor(size=side, **options)
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=side, **options)
