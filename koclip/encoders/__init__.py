"""Embed images and texts with any dual encoder. `load` opens a model; `Encoder` is the interface of all models.

Every module of this folder with `FORM` and `open_spec(spec, device)` opens specs. A spec `<module>:<rest>` is opened by
the module of that name, any other spec by `koclip.encoders.transformers`. To support another library, add a file.
Error messages show `FORM`, the form of the module's specs.

Weights are safetensors. Some models of open_clip and sentence-transformers are published in pickles only; these
libraries read them with `torch.load(weights_only=True)`, which runs no code. A file in a spec must be safetensors.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from koclip.config import ConfigError, check
from koclip.encoders.base import Encoder, NoPatchesError

__all__ = ["FAULTS", "Encoder", "NoPatchesError", "first_line", "forms", "load", "open_spec", "usable"]

# Errors of a model whose parts do not fit together.
FAULTS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
_DEFAULT = "transformers"


def load(spec: str | Path, device: str | torch.device | None = None) -> Encoder:
    """Open a dual encoder, in fp32 and evaluation mode. It embeds an image and a text once, as a check.

    Args:
        spec: A directory such as a run's `model/`, a Hub id, or `open_clip:...`, `sentence_transformers:...`,
            `mclip:...` (`koclip.encoders.forms` lists the forms).
        device: Device of the model; default: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the model cannot be loaded, has missing or unexpected weights, is not a dual encoder, or has parts
            that do not fit together; or a package that it needs is not installed.
    """
    spec = str(spec)
    encoder = open_spec(spec, usable(device))
    try:
        image = encoder.encode_images([Image.new("RGB", (64, 48), (200, 40, 90))])
        text = encoder.encode_texts(["a picture"])
    except FAULTS as error:
        raise ConfigError(
            f"model: {spec} does not embed a picture and a text: {type(error).__name__}: {first_line(error)}. "
            "Expected a model, a tokenizer and an image processor that fit together: use another model"
        ) from error
    shapes = tuple(image.shape), tuple(text.shape)
    expected = "expected (1, D) twice, in one space: use a text model and an image model that fit together"
    fits = image.ndim == 2 and shapes[0] == shapes[1]
    check(fits, f"model: {spec}, shapes of an image's and a text's embedding", shapes, expected)
    return encoder


def open_spec(spec: str, device: torch.device) -> Encoder:
    """Open a dual encoder without the check of `load`.

    Raises:
        ConfigError: see `load`.
    """
    openers = _openers()
    kind, colon, _ = spec.partition(":")
    known = not colon or kind in openers or Path(spec).is_dir()
    check(known, "model", spec, f"expected {forms()}")
    encoder: Encoder = openers[kind if colon and kind in openers else _DEFAULT].open_spec(spec, device)
    return encoder


def forms() -> str:
    """Return the forms of specs, for help texts and errors."""
    openers = _openers()
    return ", ".join([openers.pop(_DEFAULT).FORM, *(opener.FORM for opener in openers.values())])


def usable(device: str | torch.device | None) -> torch.device:
    """Return the device; default: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device cannot be used on this machine.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device or default).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: got {str(device)!r}, which cannot be used: {first_line(error)}; use cpu") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0]


def _openers() -> dict[str, ModuleType]:
    """Return the modules of this folder that open specs, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {name: import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "FORM")}
