"""Export a dual encoder as two ONNX graphs, and prove that ONNX Runtime computes the same embeddings.

`onnx/vision_model.onnx` takes pixel_values (B, 3, H, W) and gives image_embeds (B, D); `onnx/text_model.onnx` takes
input_ids and attention_mask (B, L) and gives text_embeds (B, D); both of unit norm, B and L free. Files and names are
those that transformers.js looks for.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from koclip.config import ConfigError, RunError
from koclip.data import scenes
from koclip.data.transforms import view_size
from koclip.models import StockModel
from koclip.models.dual_encoder import encode_images, encode_texts
from koclip.models.inference import load
from koclip.text import tokenizers

FOLDER = "onnx"
SIDES = ("vision_model", "text_model")
EXACT, INT8 = "", "_quantized"  # kinds of graphs, as their names end
RESULTS = "results.json"  # what the graphs in int8 lose (`koclip.publishing.quantized`)
FILES = (*(f"{side}{kind}.onnx" for side in SIDES for kind in (EXACT, INT8)), RESULTS)
MOST = 1e-4  # largest difference of a number of an embedding that is taken for rounding
_OPSET = 18
_PROBES = 32  # pictures, and captions in each language, that graphs are tried on


class _Images(nn.Module):
    def __init__(self, model: StockModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return encode_images(self.model, pixel_values)


class _Texts(nn.Module):
    def __init__(self, model: StockModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return encode_texts(self.model, input_ids, attention_mask)


class Parity(NamedTuple):
    """How a graph's embeddings differ from the model's."""

    largest: float  # difference of a number
    cosine: float  # mean, of an embedding with its own

    def __str__(self) -> str:
        return f"embeddings differ by {self.largest:.1e} at most, mean cosine {self.cosine:.5f}"


def export(directory: str | Path, output: Path, int8: bool = False) -> dict[str, Parity]:
    """Write a model's graphs to `output`/onnx, in the place of earlier ones; return how they differ, by file name.

    Args:
        directory: A dual encoder that `koclip.load` loads.
        output: Where the folder `onnx` goes.
        int8: Write `*_quantized.onnx`, too: weights in 8 bits per channel, activations quantized as they come.

    Raises:
        ConfigError: the packages are not installed.
        RunError: a graph in fp32 differs from the model by more than 1e-4, or one in int8 is not finite.
    """
    quantize = _quantizer()
    model, processor = load(directory, "cpu")
    images, texts = _probes(processor)
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # those of other weights, and what was not asked for this time
        (folder / name).unlink(missing_ok=True)
    found: dict[str, Parity] = {}
    for name, side, inputs in zip(SIDES, (_Images(model), _Texts(model)), (images, texts), strict=True):
        file = folder / f"{name}.onnx"
        _write(side.eval(), inputs, file)
        found[file.name] = parity(side, inputs, file)
        if not found[file.name].largest <= MOST:  # so written, NaN is too much
            raise RunError(f"{file} differs from the model by {found[file.name].largest:.1e}, more than {MOST:.0e}")
        if int8:
            small = folder / f"{name}{INT8}.onnx"
            quantize(file, small)
            found[small.name] = parity(side, inputs, small)
            if not math.isfinite(found[small.name].largest):
                raise RunError(f"{small} gives values that are not finite: 8 bits do not do for it; take --onnx fp32")
    return found


@torch.no_grad()
def parity(side: nn.Module, inputs: Mapping[str, torch.Tensor], file: Path) -> Parity:
    """Return how the embeddings of ONNX Runtime differ from those of a side of the model."""
    expected = side(**inputs)
    got = run(session(file), inputs)
    cosine = torch.nn.functional.cosine_similarity(expected, got, dim=-1).mean().item()
    return Parity((expected - got).abs().max().item(), cosine)


def session(file: Path) -> Any:
    """Open a graph."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the embeddings (B, D) that an opened graph makes."""
    (made,) = opened.run(None, {name: one.numpy() for name, one in inputs.items()})
    return torch.from_numpy(made)


def _write(side: nn.Module, inputs: Mapping[str, torch.Tensor], file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1)
    shapes = {name: {0: batch} if one.dim() == 4 else {0: batch, 1: length} for name, one in inputs.items()}
    output = "image_embeds" if "pixel_values" in inputs else "text_embeds"
    with _quiet():
        torch.onnx.export(
            side,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def _probes(processor: ProcessorMixin) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return scenes and their captions, Korean and English, as the model takes them."""
    side = view_size(processor.image_processor)
    drawn = [scenes.scene("test", 0, number) for number in range(_PROBES)]
    pictures = [Image.fromarray(scenes.draw(one, number)).resize((side, side)) for number, one in enumerate(drawn)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    captions = [told for one in drawn for language in scenes.LANGUAGES for told in scenes.captions(one)[language][:1]]
    encoded: Any = tokenizers.encode(processor.tokenizer, captions, padding=True, return_tensors="pt")
    return {"pixel_values": pixels}, {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _quantizer() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ConfigError(f"onnx: {error.name} is not installed; pip install 'koclip[onnx]'") from error

    def quantize(file: Path, small: Path) -> None:
        graph = onnx.load(file)
        del graph.graph.value_info[:]  # shapes from before weights were folded, which the quantizer would stumble over
        with _quiet():
            quantize_dynamic(graph, small, per_channel=True, weight_type=QuantType.QInt8)

    return quantize


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters say of their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
