"""What an evaluation leaves in a run's directory: results.json, and after training a table and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from koclip import storage
from koclip.evaluation.embed import Embedder
from koclip.evaluation.evaluate import evaluate
from koclip.evaluation.notes import described, notes
from koclip.evaluation.report.drawing import korean_style, save
from koclip.evaluation.report.grids import queries
from koclip.evaluation.report.printing import print_tables
from koclip.evaluation.report.table import MAIN, place, sections, split
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric


class Measured(NamedTuple):
    """The model that numbers are of."""

    name: str  # as it was named to koclip
    fingerprint: str  # of all that its embeddings depend on (`koclip.encoders.base.Encoder`)


def report(run: Path, config: Any, embedder: Embedder, sets: Sequence[EvalSet]) -> dict[str, Metric]:
    """Evaluate; write results.json and pictures/ in the run directory; print the table and what could not be used."""
    metrics = evaluate(embedder, sets)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    data = described(sets, str(run / "model"))
    model = Measured(str(run / "model"), embedder.fingerprint)
    write_results(run / "results.json", model, data, metrics, environment)
    pictures = run / "pictures"
    with korean_style():
        for one in sets:
            figure = queries(embedder, one)
            if figure is not None:
                save(figure, pictures / f"queries-{file_name(one.name)}.png")
        save(training_figure(run / "metrics.jsonl", metrics), pictures / "training.png")
    if sets:
        sets[0].pictures[0].save(pictures / "example.png")
        said = {name: notes({run.name: facts}) for name, facts in data.items()}
        print_tables(sections([metrics], {}), [run.name], notes=said)
    skipped = len(storage.read_lines(run / "skipped.jsonl"))
    if skipped:
        print(f"{skipped:,} samples could not be used: {run / 'skipped.jsonl'} lists them with their reasons")  # noqa: T201
    return metrics


def write_results(
    path: Path, model: Measured, data: dict[str, Any], metrics: dict[str, Metric], environment: dict[str, Any]
) -> None:
    """Write results.json: what was evaluated, on what, with which numbers, where; keys are in alphabetical order.

    Raises:
        ValueError: a number is not finite.
    """
    results = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "data": data,
        "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
        "environment": environment,
    }
    ordered = json.loads(json.dumps(results, sort_keys=True, allow_nan=False))
    results = {name: ordered[name] for name in results}  # the contract's order; below it, alphabetical
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_name(name: str) -> str:
    """Return a data set's or model's name as part of a file's."""
    return name.replace("/", "-")


def training_figure(log: Path, final: dict[str, Metric]) -> Figure:
    """Draw the loss of a run over its steps, and the recall or accuracy it was watched on; `final` is at the end."""
    logged = storage.read_lines(log)
    losses = [(line["step"], line["loss"]) for line in logged if line.get("loss") is not None]
    watched = {name for line in logged for name in line if name.endswith(("text_to_image/recall@10", "/accuracy"))}
    watched = {name for name in watched if place(split(name)[2])[0] == MAIN}
    logged.append({"step": logged[-1]["step"], **{name: metric.value for name, metric in final.items()}})
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*losses, strict=True), color="tab:grey", marker=".", label="loss")
    axis.set(xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    if watched:
        percent = axis.twinx()
        percent.set(ylabel="%", ylim=(0, 100))
        for name in sorted(watched):
            points = [(line["step"], 100 * line[name]) for line in logged if name in line]
            percent.plot(*zip(*points, strict=True), marker="o", label=name)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure
