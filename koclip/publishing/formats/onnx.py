"""Export a dual encoder as two ONNX graphs, and check that ONNX Runtime computes the same embeddings.

`onnx/vision_model.onnx` maps pixel_values (B, 3, H, W) to image_embeds (B, D); `onnx/text_model.onnx` maps input_ids
and attention_mask (B, L) to text_embeds (B, D). The embeddings have unit norm; B and L are free. Names are those of
transformers.js.

Clients pad ids on either side, send too many, or cut off the end token (transformers.js). The text graph embeds all of
them like ids that the tokenizer truncated.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from koclip import storage
from koclip.config import ConfigError, RunError, check
from koclip.data.formats import scenes
from koclip.data.transforms import view_size
from koclip.encoders import load
from koclip.encoders.transformers import encode
from koclip.models import StockModel
from koclip.models.dual_encoder import encode_images, encode_texts
from koclip.models.router import RouterModel
from koclip.models.stock import layout_of, longest_text
from koclip.text import tokenizers

FOLDER = "onnx"
SIDES = ("vision_model", "text_model")
EXACT, INT8 = "", "_quantized"  # suffixes of the names of graphs in fp32 and in int8
RESULTS = "results.json"  # retrieval in int8 and fp32 (`koclip.publishing.formats.int8`)
FILES = (*(f"{side}{kind}.onnx" for side in SIDES for kind in (EXACT, INT8)), RESULTS)
MOST = 1e-4  # the largest difference of embeddings that is only rounding
_OPSET = 18
_TEXT_INPUTS = ("input_ids", "attention_mask")
_PROBES = 32  # images, and captions in each language, to check a graph


class _Images(nn.Module):
    def __init__(self, model: StockModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return encode_images(self.model, pixel_values)


class _Texts(nn.Module):
    """The text tower. It moves the tokens of each row to the front, cuts them to `longest`, and adds a missing `end`.

    A CLIP reads the embedding at the first end token. Without an end token it reads the first position, which has the
    same token in every text. For a class that reads no mask, `pad` fills every row to `longest`.
    """

    def __init__(self, model: StockModel, longest: int, end: int | None, pad: int | None) -> None:
        super().__init__()
        self.model, self.longest, self.end, self.pad = model, longest, end, pad

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        order = places + attention_mask.argmax(dim=1, keepdim=True)  # (B, L) left padding moves to the right
        order = torch.where(order < length, order, order - length)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        attention_mask = attention_mask * (places < self.longest)
        if self.end is not None:
            ended = ((input_ids == self.end) & (attention_mask == 1)).any(dim=1, keepdim=True)
            last = (places * attention_mask).amax(dim=1, keepdim=True)  # (B, 1)
            input_ids = torch.where(~ended & (places == last), self.end, input_ids)
        input_ids, attention_mask = input_ids[:, : self.longest], attention_mask[:, : self.longest]
        if self.pad is not None:
            input_ids = torch.where(attention_mask == 1, input_ids, self.pad)
            input_ids = nn.functional.pad(input_ids, (0, self.longest), value=self.pad)[:, : self.longest]
        return encode_texts(self.model, input_ids, attention_mask)


class Probe(NamedTuple):
    """Inputs to check a graph, and the model's embeddings of them."""

    inputs: dict[str, torch.Tensor]
    expected: torch.Tensor  # (B, D)


class Parity(NamedTuple):
    """The difference between a graph's embeddings and the model's."""

    largest: float  # absolute difference
    cosine: float  # mean cosine similarity

    def __str__(self) -> str:
        return f"embeddings differ by {self.largest:.1e} at most, mean cosine {self.cosine:.5f}"


def export(directory: str | Path, output: Path, int8: bool = False) -> dict[str, Parity]:
    """Replace the graphs in `output`/onnx by those of a model; return their differences by file name.

    Args:
        directory: A dual encoder that `koclip.load` loads.
        output: Parent of the folder `onnx`.
        int8: Also write `*_quantized.onnx`: weights in 8 bits per channel, activations quantized dynamically.

    Raises:
        ConfigError: a package is missing, or the model is a `Router` of sentence-transformers.
        RunError: a graph in fp32 differs from the model by more than 1e-4, or a graph in int8 gives NaN or infinity.
    """
    quantize = _quantizer()
    encoder = load(directory, "cpu")
    model, processor = encoder.model, encoder.processor
    fix = "expected a class of transformers, whose graphs transformers.js loads: publish without --onnx"
    check(not isinstance(model, RouterModel), "onnx", f"the RouterModel in {directory}", fix)
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # they may be of other weights
        (folder / name).unlink(missing_ok=True)
    differences: dict[str, Parity] = {}
    for name, (side, probes) in zip(SIDES, (_image_side(model, processor), _text_side(model, processor)), strict=True):
        file = folder / f"{name}.onnx"
        _write(side.eval(), probes[0].inputs, file)
        differences[file.name] = parity(probes, file)
        if not differences[file.name].largest <= MOST:  # also true for NaN
            largest = differences[file.name].largest
            raise RunError(f"{file}: embeddings differ by {largest:.1e} from the model's, expected at most {MOST:.0e}")
        if int8:
            small = folder / f"{name}{INT8}.onnx"
            with storage.atomic(small) as partial:
                quantize(file, partial)
            differences[small.name] = parity(probes, small)
            if not math.isfinite(differences[small.name].largest):
                raise RunError(f"{small}: embeddings are not finite, because int8 is too coarse; use --onnx fp32")
    return differences


def parity(probes: Sequence[Probe], file: Path) -> Parity:
    """Compare the embeddings of ONNX Runtime with the model's."""
    opened = session(file)
    expected = torch.cat([probe.expected for probe in probes])
    got = torch.cat([run(opened, probe.inputs) for probe in probes])
    cosine = torch.nn.functional.cosine_similarity(expected, got, dim=-1).mean().item()
    return Parity((expected - got).abs().max().item(), cosine)


def session(file: Path) -> Any:
    """Open a graph in ONNX Runtime."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the embeddings (B, D) of an opened graph."""
    (embeddings,) = opened.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(embeddings)


def _write(side: nn.Module, inputs: Mapping[str, torch.Tensor], file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1)
    shapes = {name: {0: batch} if tensor.dim() == 4 else {0: batch, 1: length} for name, tensor in inputs.items()}
    output = "image_embeds" if "pixel_values" in inputs else "text_embeds"
    with _quiet():
        program = torch.onnx.export(
            side,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # with dynamo=True
    proto = program.model_proto
    # PyTorch stores the source of every node: stack traces with paths of this machine, and memory addresses.
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        part.ClearField("metadata_props")
    with storage.atomic(file) as partial:
        partial.write_bytes(proto.SerializeToString())


@torch.no_grad()
def _image_side(model: StockModel, processor: ProcessorMixin) -> tuple[nn.Module, list[Probe]]:
    """Return the module to export for images, and scenes to check it."""
    side = view_size(processor.image_processor)
    drawn = [scenes.scene("test", 0, number) for number in range(_PROBES)]
    pictures = [Image.fromarray(scenes.draw(scene, number)).resize((side, side)) for number, scene in enumerate(drawn)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return _Images(model), [Probe({"pixel_values": pixels}, encode_images(model, pixels))]


@torch.no_grad()
def _text_side(model: StockModel, processor: ProcessorMixin) -> tuple[nn.Module, list[Probe]]:
    """Return the module to export for texts, and captions to check it: as the tokenizer and as clients prepare them."""
    tokenizer: Any = processor.tokenizer
    longest = longest_text(tokenizer, model.text_model)
    drawn = [scenes.scene("test", 0, number) for number in range(_PROBES)]
    captions = [
        text for scene in drawn for language in scenes.LANGUAGES for text in scenes.captions(scene)[language][:1]
    ]
    long = [" ".join(texts * (longest // 2)) for texts in (captions[:2], captions[2:4])]
    tokens = [tokenizer(text, verbose=False)["input_ids"] for text in (*captions[:4], *long)]
    last = tokens[0][-1]
    pad = None if layout_of(model).reads_mask else tokenizer.pad_token_id
    side = _Texts(model, longest, last if last in tokenizer.all_special_ids else None, pad)

    whole = encode(tokenizer, captions, model.text_model)
    fitted = [captions, [*captions[:4], *long, *long]]
    if pad is None:
        fits = [encode(tokenizer, texts, model.text_model) for texts in fitted]
    else:
        fits = [tokenizers.encode(tokenizer, texts, padding=True, return_tensors="pt") for texts in fitted]
    sent: Any = {"input_ids": [*tokens, *(ids[:longest] for ids in tokens[4:])]}
    with _quiet():
        odd = [
            tokenizer.pad(sent, return_attention_mask=True, padding_side=where, return_tensors="pt")
            for where in ("left", "right")
        ]
    return side, [
        Probe({name: given[name] for name in _TEXT_INPUTS}, encode_texts(model, *(fit[name] for name in _TEXT_INPUTS)))
        for given, fit in ((whole, fits[0]), *((padded, fits[1]) for padded in odd))
    ]


def _quantizer() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ConfigError(f"onnx: {error.name} is missing; pip install 'koclip[onnx]'") from error

    def quantize(file: Path, small: Path) -> None:
        graph = onnx.load(file)
        del graph.graph.value_info[:]  # the quantizer fails on outdated shapes
        with _quiet():  # signed weights overflow on CPUs without VNNI: sums of their products are kept in 16 bits
            quantize_dynamic(graph, small, per_channel=True, weight_type=QuantType.QUInt8)

    return quantize


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
