"""Embed images and texts with any dual encoder. `load` opens a model by a spec; `Encoder` is what every model offers.

Every module of this folder with `FORM` and `open_spec(spec, device)` opens specs. A spec `<module>:<rest>` goes to the
module of that name, any other to `koclip.encoders.transformers`. To support another library, add a file. `FORM` says
what the specs of the module look like; error messages show it.

Weights are safetensors. Of what open_clip and sentence-transformers publish, some is in pickles only: those libraries
read it with `torch.load(weights_only=True)`, which runs no code. A file that a spec names must be safetensors.
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

# What a model whose parts do not belong together raises when it is used.
FAULTS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
_DEFAULT = "transformers"


def load(spec: str | Path, device: str | torch.device | None = None) -> Encoder:
    """Open a dual encoder, in fp32 and evaluation mode. It embeds an image and a text once, to make sure that it can.

    Args:
        spec: A directory such as a run's `model/`, a Hub id, or `open_clip:...`, `sentence_transformers:...`,
            `mclip:...` (`koclip.encoders.forms` lists the forms).
        device: Where to put the model; default: a GPU if there is one.

    Raises:
        ConfigError: nothing there can be loaded, weights are missing or unexpected, it is no dual encoder, its parts do
            not belong together, or the package that it needs is not installed.
    """
    spec = str(spec)
    encoder = open_spec(spec, usable(device))
    picture = [Image.new("RGB", (64, 48), (200, 40, 90))]
    try:
        outputs = encoder.encode_images(picture), encoder.encode_texts(["a picture"]), encoder.image_features(picture)
    except FAULTS as error:
        raise ConfigError(
            f"model: {spec} does not embed a picture and a text: {type(error).__name__}: {first_line(error)}. "
            "Expected a model, a tokenizer and an image processor that belong together: take another"
        ) from error
    shapes = [tuple(output.shape) for output in outputs]
    fits = len(shapes[0]) == len(shapes[2]) == 2 and shapes[0] == shapes[1]
    expected = "expected (1, D), (1, D), (1, W): texts and images in one space. Take parts that belong together"
    check(fits, f"model: {spec}, shapes of an image's and a text's embedding and an image's features", shapes, expected)
    return encoder


def open_spec(spec: str, device: torch.device) -> Encoder:
    """Open a dual encoder without trying it.

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
    """Return the forms that a spec may have, for help and errors."""
    openers = _openers()
    return ", ".join([openers.pop(_DEFAULT).FORM, *(opener.FORM for opener in openers.values())])


def usable(device: str | torch.device | None) -> torch.device:
    """Return a device; by default a GPU if there is one.

    Raises:
        ConfigError: there is no such device, or it cannot be used here.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device or default).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: got {str(device)!r}, which cannot be used here: {first_line(error)}; take cpu"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0]


def _openers() -> dict[str, ModuleType]:
    """Return the modules of this folder that open specs, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {name: import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "FORM")}
