"""Measure how much retrieval loses with `onnx/*_quantized.onnx`; the result is beside the graphs and on the card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich import box
from rich.table import Table
from transformers import AutoProcessor, ProcessorMixin

from koclip.config import ConfigError, EvalSetConfig, SourceConfig, check
from koclip.data.transforms import PIXEL_LIMIT, PixelLimit
from koclip.encoders import load
from koclip.encoders.base import in_batches
from koclip.evaluation.embed import Images, collect
from koclip.evaluation.report.table import cell, console, sections
from koclip.evaluation.results import Measured, Record, records_of, write_results
from koclip.evaluation.run import counts, notes, surroundings
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import SPECS
from koclip.evaluation.tasks.retrieval import approximated
from koclip.metrics import Metric
from koclip.publishing.formats.onnx import EXACT, FOLDER, INT8, RESULTS, SIDES, run, session
from koclip.text import tokenizers

_LOST = "Lost: percentage points with 95 % intervals; * if the interval excludes 0."
_NAME = "int8"
_MOST = 1_000  # images of a set from results.json
_SCENES = "--int8_sets '[{source: {scenes_part: test, scenes_size: 1000}}]'"
_HEADINGS = ("data set", "language", "measure", "fp32", "int8", "lost", "n")


class Losses(NamedTuple):
    """A measurement as text."""

    files: str  # a sentence on the sizes of the files
    rows: list[tuple[str, ...]]  # of `_HEADINGS`
    measured: str  # sentences on the data


class _Graphs:
    """The graphs of both towers. They embed each image or text alone, as in a browser.

    The range of a batch decides how its activations are rounded, so the embedding of an item depends on its batch.
    """

    def __init__(self, folder: Path, kind: str, processor: ProcessorMixin) -> None:
        self._vision, self._text = (session(folder / f"{side}{kind}.onnx") for side in SIDES)
        self._processor = processor

    def images(self, pictures: Images) -> torch.Tensor:
        """Return (N, D) embeddings."""

        def embed(picture: list[Image.Image]) -> torch.Tensor:
            pixels = self._processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            return run(self._vision, {"pixel_values": pixels})

        return in_batches(embed, pictures, 1, "images")

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (N, D) embeddings."""

        def embed(text: list[str]) -> torch.Tensor:
            encoded = tokenizers.encode(self._processor.tokenizer, text, return_tensors="pt")
            return run(self._text, {name: encoded[name] for name in ("input_ids", "attention_mask")})

        return in_batches(embed, texts, 1, "texts")


def open_sets(
    named: Sequence[EvalSetConfig], evaluated: Mapping[str, Any], limit: PixelLimit = PIXEL_LIMIT
) -> list[EvalSet]:
    """Open the sets to measure on: `named`, else the sets with retrieval in `evaluated`, else the built-in scenes.

    `evaluated` is `data` of results.json.

    Raises:
        ConfigError: a set cannot be read on this machine.
    """
    if named:
        return [open_set(config, limit) for config in named]
    opened = []
    for name, described in evaluated.items():
        values = described.get("source", {})
        if "retrieval" not in values.get("tasks", ()):
            continue
        try:
            opened.append(open_set(_retrieval_config(values), limit))
        except (ConfigError, TypeError) as error:  # TypeError: a koclip with other keys wrote results.json
            raise ConfigError(
                f"int8_sets: the data set {name} of results.json cannot be read here: {error}. Give sets as for "
                f"koclip evaluate, or the built-in scenes: {_SCENES}"
            ) from error
    return opened or [open_set(EvalSetConfig(), limit)]


def _retrieval_config(values: Mapping[str, Any]) -> EvalSetConfig:
    """Return the configuration of a set's retrieval from its `source` in results.json."""
    most = min(values.get("max_images") or _MOST, _MOST)
    gallery = [SourceConfig(**value) for value in values.get("gallery", [])]
    share = values.get("max_skipped_fraction", EvalSetConfig.max_skipped_fraction)
    source = SourceConfig(**values["source"])
    return EvalSetConfig(source=source, gallery=gallery, max_images=most, max_skipped_fraction=share)


def measure(directory: Path, sets: Sequence[EvalSet], model: str) -> Losses:
    """Compare retrieval with a model's graphs in int8 and in fp32; write onnx/results.json.

    It has the form of every results.json, with the name `model`: recall of both, and `drop@k`, the loss.
    """
    processor = AutoProcessor.from_pretrained(directory)
    both = [_Graphs(directory / FOLDER, kind, processor) for kind in (EXACT, INT8)]
    metrics: dict[str, Metric] = {}
    for eval_set in sets:
        images = [graphs.images(eval_set.images) for graphs in both]
        for language in eval_set.languages:
            captions = collect(eval_set.texts(language), eval_set.gallery.get(language, []))
            exact, int8 = zip(images, (graphs.texts(captions.texts) for graphs in both), strict=True)
            metrics_of_set = approximated(captions, exact, int8, _NAME)
            metrics |= {f"{eval_set.name}/{language}/{name}": metric for name, metric in metrics_of_set.items()}
    # Without paths and the command, because this file is published.
    data = {eval_set.name: counts(eval_set) for eval_set in sets}
    environment = {name: value for name, value in surroundings().items() if name != "command"}
    measured = Measured(model, load(str(directory), "cpu").fingerprint())
    write_results(directory / FOLDER / RESULTS, measured, data, metrics, environment)
    return _losses(directory / FOLDER)


def read(directory: Path, fingerprint: str) -> Losses | None:
    """Return the measurement of a model's graphs; None without one.

    Raises:
        ConfigError: the graphs are of a model with another fingerprint.
    """
    file = directory / FOLDER / RESULTS
    if not file.is_file():
        return None
    measured = json.loads(file.read_text(encoding="utf-8")).get("fingerprint")
    expected = f"expected {fingerprint}, the model's: the graphs are of another model; export again with --onnx int8"
    check(measured == fingerprint, f"{file}, fingerprint", measured, f"{expected}, or delete {directory / FOLDER}")
    return _losses(directory / FOLDER)


def _losses(folder: Path) -> Losses:
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    metrics = {name: Metric.from_dict(values) for name, values in results["metrics"].items()}
    exact, int8 = (
        sum((folder / f"{side}{kind}.onnx").stat().st_size for side in SIDES) / 1e6 for kind in (EXACT, INT8)
    )
    counts = {name: described["images"] for name, described in results["data"].items()}
    data = [f"{name} ({count:,} images; R@1 by chance: about {100 / count:.2g} %)" for name, count in counts.items()]
    rows = [f"{name}: {note}." for name, described in results["data"].items() for note in notes({name: described})]
    return Losses(
        f"`{FOLDER}/*{INT8}.onnx` store weights in 8 bits: {int8:,.1f} MB instead of {exact:,.1f} MB.",
        list(_rows(records_of(metrics, SPECS))),
        " ".join([f"Measured on {', '.join(data)}.", *rows, _LOST]),
    )


def print_losses(losses: Losses) -> None:
    """Print a measurement."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:3] else "right")
    for row in losses.rows:
        table.add_row(*row)
    out = console()
    for part in (losses.files, table, losses.measured):
        out.print(part, highlight=False, markup=False)


def _rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of `_HEADINGS`, Korean first."""
    approximated = {_query(record, record.spec.unit): record for record in records if "approximation" in record.params}
    for section in sections([records], {}):
        for line in sorted(section.main, key=lambda line: line.language != "ko"):
            (exact,) = line.records
            if exact and _query(exact, "percent") in approximated:
                int8, lost = (cell(approximated[_query(exact, unit)]) for unit in ("percent", "points"))
                yield section.name, line.language, line.label, cell(exact).value, int8.value, str(lost), f"{line.n:,}"


def _query(record: Record, unit: str) -> tuple[object, ...]:
    """Return the fields that a number in int8 shares with its number in fp32, and a unit."""
    return record.dataset, record.language, record.params.get("direction"), record.params.get("k"), unit
