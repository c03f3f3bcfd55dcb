"""Write an evaluation: results.json and pictures of each model, and table.md and report.html of all models.

`report.html` needs no other file: it contains its pictures.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from koclip import storage
from koclip.config import ConfigError
from koclip.encoders import load
from koclip.evaluation.embed import Embedder
from koclip.evaluation.forgetting import HEADING, compare
from koclip.evaluation.report import forgotten
from koclip.evaluation.report.charts import charts, korean_style, save
from koclip.evaluation.report.grids import confusion, queries
from koclip.evaluation.report.page import content, render
from koclip.evaluation.report.table import NOTE, Line, Section, Templates, markdown, print_tables, sections
from koclip.evaluation.results import Measured, Record, records_of, write_results
from koclip.evaluation.run import described, evaluate, evaluate_source, labels_of, notes, warnings_of
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks import SPECS, TASKS
from koclip.metrics import Metric

_TRAINING = "training.png"
_LISTED = 200  # skipped samples on the page


class Evaluated(NamedTuple):
    """A model with its metrics."""

    model: str  # the path, Hub id or spec that the user gave
    folder: Path  # of its results
    embedder: Embedder
    metrics: dict[str, Metric]  # of `evaluate`, and of the comparison with the source
    source: str | None = None  # the model that it is compared with


class Source(NamedTuple):
    """The model that a run started from."""

    name: str  # that the user gave
    model: str  # a spec of `koclip.load`: `name`, or the directory of a converted model
    cache: Path  # folder of its embeddings


def report(
    run: Path, embedder: Embedder, eval_sets: Sequence[EvalSet], source: Source | None = None
) -> dict[str, Metric]:
    """Evaluate the model of a training run; write results.json, pictures/, table.md and report.html; print the table.

    `run` is the run directory, with environment.json, metrics.jsonl and model/; `embedder` embeds with the saved model.
    With a `source`, it is evaluated, too, and compared with the model.

    Raises:
        Exception: the comparison failed. The report is written all the same, with the reason. A `ConfigError` is not
            raised.
    """
    metrics = evaluate(embedder, eval_sets)
    warnings = warnings_of(embedder, eval_sets)
    evaluated = Evaluated(str(run / "model"), run, embedder, metrics, source.name if source else None)
    try:
        if source is not None:
            with suppress(ConfigError):  # it is in the warnings
                compare_with_source([evaluated], partial(_load, source, embedder.batch_size), eval_sets, warnings)
    finally:  # training took longer than the comparison: keep its report
        _report(run, evaluated, eval_sets, warnings)
    return metrics


def _load(source: Source, batch_size: int) -> Embedder:
    return Embedder(load(source.model), batch_size, source.cache)


def compare_with_source(
    models: Sequence[Evaluated], load_source: Callable[[], Embedder], eval_sets: Sequence[EvalSet], warnings: list[str]
) -> None:
    """Evaluate the source of models, and add each model's comparison with it to the model's metrics.

    Raises:
        Exception: this failed. Its reason is added to `warnings`.
    """
    try:
        first = models[0]
        before = evaluate_source(load_source(), first.embedder, eval_sets, first.metrics)
        for model in models:
            model.metrics.update(compare(before, model.metrics, SPECS))
    except Exception as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        warnings.append(f"The source is not compared: {reason}")
        raise


def _report(run: Path, evaluated: Evaluated, eval_sets: Sequence[EvalSet], warnings: Sequence[str]) -> None:
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    with korean_style():
        save(training_figure(run / "metrics.jsonl", evaluated.metrics), run / "pictures" / _TRAINING)
    if eval_sets:
        with storage.atomic(run / "pictures" / "example.png") as picture:
            eval_sets[0].images[0].save(picture)
    write(run, [evaluated], eval_sets, environment, warnings)


def write(
    run: Path,
    evaluated: Sequence[Evaluated],
    eval_sets: Sequence[EvalSet],
    environment: Mapping[str, Any],
    warnings: Sequence[str],
) -> None:
    """Write results.json and pictures/ of every model, table.md and report.html, and print the table.

    A single process does this. It embeds again what the pictures need and the embedders' cache lacks.

    `run` is the directory of the evaluation; config.yaml and skipped.jsonl in it are shown. `environment` is that of
    results.json, and `warnings` are for readers of the numbers.

    Raises:
        ValueError: a metric is not finite.
    """
    data = {model.model: write_model_results(model, eval_sets, environment) for model in evaluated}
    labels = labels_of([model.model for model in evaluated])
    records = {model.model: records_of(model.metrics, SPECS) for model in evaluated}
    templates = {eval_set.name: eval_set.used_templates for eval_set in eval_sets}
    names = dict.fromkeys(name for own in data.values() for name in own)
    notes_of = {name: notes({labels[model]: own[name] for model, own in data.items()}) for name in names}
    rows = sections(list(records.values()), templates)
    compared = {model.model: forgotten.rows(records[model.model]) for model in evaluated if model.source}
    if rows:
        page = markdown(rows, list(labels.values()), warnings, notes_of)
        print_tables(rows, list(labels.values()), warnings, notes_of)
        for model in evaluated:
            if own := compared.get(model.model):
                page += "\n" + forgotten.markdown(own, labels[model.model], str(model.source))
                forgotten.print_table(own, labels[model.model], str(model.source))
        storage.replace_text(run / "table.md", page)
    skipped = len(storage.read_lines(run / "skipped.jsonl"))
    if skipped:
        print(f"{skipped:,} samples could not be used: {run / 'skipped.jsonl'} lists them with their reasons")  # noqa: T201
    models = []
    for model in evaluated:
        drawn = _draw(model, records[model.model], eval_sets, templates)
        training = model.folder / "pictures" / _TRAINING
        label = labels[model.model]
        training_file = training if training.is_file() else None
        own = compared.get(model.model, [])
        models.append(PageModel(model.model, label, drawn, data[model.model], training_file, model.source, own))
    if rows:
        _write_page(run, models, rows, environment, warnings)


def write_model_results(
    model: Evaluated, eval_sets: Sequence[EvalSet], environment: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write a model's results.json; return its `data`.

    Raises:
        ValueError: a metric is not finite.
    """
    data = described(eval_sets, model.model)
    measured = Measured(model.model, model.embedder.fingerprint)
    write_results(model.folder / "results.json", measured, data, model.metrics, dict(environment))
    return data


def _draw(
    model: Evaluated, records: Sequence[Record], eval_sets: Sequence[EvalSet], templates: Templates
) -> dict[str, dict[str, Path]]:
    """Draw a model's pictures; return their files by data set and kind."""
    embedder = model.embedder.alone()
    drawn: dict[str, dict[str, Path]] = {}
    with korean_style():
        for eval_set in tqdm(eval_sets, desc="pictures", leave=False):
            figures = dict(charts(eval_set.name, records, templates[eval_set.name]))
            if figure := forgotten.chart(records, eval_set.name):
                figures["forgotten"] = figure
            if any(eval_set.captions):
                figures["queries"] = queries(embedder, eval_set)
            for task in TASKS:
                if task.confusions and task.name in eval_set.tasks:
                    for language, counts in task.confusions(embedder, eval_set):
                        figures[f"confusion-{language}"] = confusion(counts.numpy(), eval_set, language)
            name = eval_set.name.replace("/", "-")
            drawn[eval_set.name] = {kind: model.folder / "pictures" / f"{kind}-{name}.png" for kind in figures}
            for kind, figure in figures.items():
                save(figure, drawn[eval_set.name][kind])
    return drawn


def training_figure(log: Path, final: Mapping[str, Metric]) -> Figure:
    """Draw the loss of a run over its steps, and the watched metrics, with their `final` values at the end."""
    logged = storage.read_lines(log)
    losses = [(line["step"], line["loss"]) for line in logged if line.get("loss") is not None]
    logged.append({"step": logged[-1]["step"], **{name: metric.value for name, metric in final.items()}})
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*losses, strict=True), color="tab:grey", marker=".", label="loss")
    axis.set(xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    watched = sorted((record for record in records_of(final, SPECS) if record.spec.watched), key=attrgetter("name"))
    if watched:
        percent = axis.twinx()
        percent.set(ylabel="%", ylim=(0, 100))
        for record in watched:
            points = [(line["step"], 100 * line[record.name]) for line in logged if record.name in line]
            label = f"{record.dataset}: {record.label()} ({record.language})"
            percent.plot(*zip(*points, strict=True), marker="o", label=label)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


_KINDS = {
    "forgotten": HEADING,
    "recall": "Recall",
    "queries": "Captions and their nearest images",
    "stress": "Recall by rewritten Korean captions",
    "templates": "Gain by templates",
    "confusion": "Confusion of classes",
    "shift": "Accuracy under shift",
    "shots": "Few-shot probe",
}


class PageModel(NamedTuple):
    """A model on the page."""

    name: str  # the path, Hub id or spec that the user gave
    label: str  # a short name
    pictures: Mapping[str, Mapping[str, Path]]  # files by data set and kind
    data: Mapping[str, Mapping[str, Any]]  # `data` of results.json
    training: Path | None = None  # chart of its training
    source: str | None = None  # the model that it is compared with
    compared: Sequence[forgotten.Row] = ()


def _write_page(
    run: Path,
    models: Sequence[PageModel],
    sections: Sequence[Section],
    environment: Mapping[str, Any],
    warnings: Sequence[str],
) -> None:
    configuration, skipped = run / "config.yaml", storage.read_lines(run / "skipped.jsonl")
    fields = {
        "labels": {model.name: model.label for model in models},
        "summary": [(section.name, [line for line in section.main if line.spec.summary]) for section in sections],
        "sections": sections,
        "pictures": {section.name: _pictures(section.name, models) for section in sections},
        "notes": {section.name: _notes(section.name, models) for section in sections},
        "training": [(own.label, "loss over steps", content(own.training)) for own in models if own.training],
        "warnings": warnings,
        "environment": environment,
        "command": shlex.join(environment["command"]),
        "configuration": configuration.read_text(encoding="utf-8") if configuration.is_file() else "",
        "skipped": [
            {name: sample.get(name, "") for name in ("key", "reason", "source")} for sample in skipped[:_LISTED]
        ],
        "num_skipped": len(skipped),
        "note": NOTE,
        "forgotten": [own for own in models if own.compared],
        "forgotten_heading": HEADING,
        "forgotten_columns": ("", *forgotten.COLUMNS[3:]),
        "forgotten_note": forgotten.NOTE,
        "best": _best,
    }
    storage.replace_text(run / "report.html", render("report.html", fields))


def _notes(name: str, models: Sequence[PageModel]) -> list[str]:
    facts = {model.label: model.data[name] for model in models if name in model.data}
    if not facts:
        return []
    first = next(iter(facts.values()))
    classes = f", {first['classes']:,} classes" if "classes" in first else ""
    return [f"{first['images']:,} images{classes}, from {first['source']['source']['path']}", *notes(facts)]


def _best(line: Line) -> list[bool]:
    """Return by model whether its share is the largest of several."""
    shares = [cell.share if cell and cell.share is not None else None for cell in line.cells]
    known = [share for share in shares if share is not None]
    return [len(known) > 1 and share == max(known) for share in shares]


def _pictures(dataset: str, models: Sequence[PageModel]) -> dict[str, list[tuple[str, str, str]]]:
    """Return a data set's pictures (label of the model, alternative text, content) by title."""
    pictures: dict[str, list[tuple[str, str, str]]] = {title: [] for title in _KINDS.values()}
    for model in models:
        for name, file in model.pictures.get(dataset, {}).items():
            kind = name.partition("-")[0]
            title = _KINDS.get(kind, kind)
            picture = (model.label, f"{title}: {dataset}, {model.label}", content(file))
            pictures.setdefault(title, []).append(picture)
    return {title: own for title, own in pictures.items() if own}
