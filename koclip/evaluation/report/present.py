"""What an evaluation leaves: results.json and pictures of every model, a table and a page of all models."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from koclip.evaluation.embed import Embedder
from koclip.evaluation.notes import described, notes
from koclip.evaluation.report import html
from koclip.evaluation.report.charts import charts, numbers_of
from koclip.evaluation.report.drawing import korean_style, save
from koclip.evaluation.report.finish import Measured, file_name, write_results
from koclip.evaluation.report.grids import confusions, queries
from koclip.evaluation.report.printing import markdown, print_tables
from koclip.evaluation.report.table import sections
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.suite import folders_of, labels_of, surroundings
from koclip.evaluation.tasks.zero_shot import asked_templates
from koclip.metrics import Metric


def present(
    run: Path,
    metrics: dict[str, dict[str, Metric]],
    embedders: dict[str, Embedder],
    sets: Sequence[EvalSet],
    warnings: Sequence[str],
) -> None:
    """Write results.json and pictures/ of every model, table.md and report.html, and print the table.

    One process does this alone: what the pictures need is taken from the embedders' cache, else computed once more.

    Args:
        run: The directory of the evaluation. Of several models, each has a directory of its own in it.
        metrics: By model, as `evaluate` names them.
        embedders: By model.
        sets: What was evaluated.
        warnings: What a reader should know.

    Raises:
        ValueError: a metric is not finite.
    """
    labels, folders = labels_of(list(metrics)), folders_of(run, list(metrics))
    for model, found in metrics.items():
        keep(folders[model], Measured(model, embedders[model].fingerprint), found, sets)
    templates = {one.name: asked_templates(one) for one in sets}
    data = {label: described(sets, model) for model, label in labels.items()}
    rows = sections(list(metrics.values()), templates)
    said = {one.name: notes({label: facts[one.name] for label, facts in data.items()}) for one in sets}
    (run / "table.md").write_text(markdown(rows, list(labels.values()), warnings, said), encoding="utf-8")
    print_tables(rows, list(labels.values()), warnings, said)
    skipped = sum(len(one.all_skipped()) for one in sets)
    if skipped:
        print(f"{skipped:,} rows were left out: {run / 'skipped.jsonl'} lists them with their reasons")  # noqa: T201
    drawn = {
        model: _draw(folders[model] / "pictures", found, embedders[model].alone(), sets, templates)
        for model, found in metrics.items()
    }
    html.write(run, labels, rows, drawn, data, warnings, surroundings())


def keep(folder: Path, model: Measured, metrics: dict[str, Metric], sets: Sequence[EvalSet]) -> None:
    """Write a model's results.json.

    Raises:
        ValueError: a metric is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", model, described(sets, model.name), metrics, surroundings())


def _draw(
    folder: Path,
    metrics: Mapping[str, Metric],
    embedder: Embedder,
    sets: Sequence[EvalSet],
    templates: Mapping[str, Mapping[str, Sequence[str]]],
) -> dict[str, dict[str, Path]]:
    """Draw a model's pictures; return their files by data set and kind."""
    drawn: dict[str, dict[str, Path]] = {}
    with korean_style():
        for one in tqdm(sets, desc="pictures", leave=False):
            drawn[one.name] = {}
            for kind, figure in _figures(one, metrics, embedder, templates):
                drawn[one.name][kind] = folder / f"{kind}-{file_name(one.name)}.png"
                save(figure, drawn[one.name][kind])
    return drawn


def _figures(
    one: EvalSet, metrics: Mapping[str, Metric], embedder: Embedder, templates: Mapping[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures of a model on a set, by kind."""
    yield from charts(numbers_of(one.name, metrics, templates))
    found = queries(embedder, one)
    if found is not None:
        yield "queries", found
    if "zero_shot" in one.config.tasks:
        for language, figure in confusions(embedder, one):
            yield f"confusion-{language}", figure
