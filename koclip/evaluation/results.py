"""Evaluation tasks, the descriptions of their metrics (`Spec`), and the measured numbers (`Record`).

A metric's name is `<data set>/<language>/<task>/<metric>`. Each task describes its names with `Spec`s. Only
`records_of` parses a name; tables, charts, pages and cards read records.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple

import torch

from koclip import storage
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric

MAIN = ""  # the group of the most important rows
IMAGES = "images"  # instead of a language, for tasks without text

Unit = Literal["percent", "points", "rank", "number"]


@dataclass(frozen=True)
class Spec:
    """Describes the metrics whose names match a pattern.

    Args:
        pattern: `<task>/<metric>` with fields in braces: `{rewrite}` matches any text, `{k:d}` a whole number.
        label: The name of the row; may use the fields.
        unit: `percent` for shares, `points` for differences of shares, `rank` and `number` for plain values.
        group: The heading of the row's group; `MAIN` comes first. May use the fields.
        params: Further fields with fixed values.
        worst: Label of a main row that shows the largest of all numbers with this spec; default: no such row.
        summary: The meaning of the number in the summary of report.html; default: not in the summary.
        chart: The chart that shows the number, and the part of the chart. An unknown chart is drawn as bars.
        card: The heading on the model card; default: the language, and only for numbers of the group `MAIN`.
        headline: By language, the number's Korean name in the summary of the card.
        hub_task: The task's name on the Hub.
        watched: Whether the chart of the training run shows it.
    """

    pattern: str
    label: str
    unit: Unit = "percent"
    group: str = MAIN
    params: Mapping[str, str | int] = field(default_factory=dict)
    worst: str = ""
    summary: str = ""
    chart: tuple[str, str] = ("", "")
    card: str = ""
    headline: Mapping[str, str] = field(default_factory=dict)
    hub_task: str = "zero-shot-image-classification"
    watched: bool = False

    def fields(self, key: str) -> dict[str, str | int] | None:
        """Return the fields of `<task>/<metric>`; None if it does not match the pattern."""
        regex, whole, _ = _compiled(self.pattern)
        match = regex.fullmatch(key)
        if match is None:
            return None
        values = {name: int(value) if name in whole else value for name, value in match.groupdict().items()}
        return {**self.params, **values}


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], frozenset[str], int]:
    """Return a pattern's regular expression, its integer fields, and the number of its letters outside of fields."""
    regex, whole, letters = "", set(), 0
    for literal, name, kind, _ in Formatter().parse(pattern):
        regex += re.escape(literal)
        letters += len(literal)
        if name:
            regex += rf"(?P<{name}>\d+)" if kind == "d" else f"(?P<{name}>.+)"
            whole |= {name} if kind == "d" else set()
    return re.compile(regex), frozenset(whole), letters


class Task(NamedTuple):
    """A measurement of a model on an evaluation set."""

    name: str  # in `sets[].tasks`
    run: Callable[[Embedder, EvalSet, str], dict[str, Metric]]  # measures in a language: metrics by <task>/<metric>
    languages: Callable[[EvalSet], Sequence[str]]  # the languages it can measure in
    specs: tuple[Spec, ...]
    check: Callable[[EvalSet], None] | None = None  # raises a ConfigError if the set is too small or lacks something
    # Confusion matrices to draw: (language, numbers of images (C, C) by class and answer).
    confusions: Callable[[Embedder, EvalSet], Iterator[tuple[str, torch.Tensor]]] | None = None


@dataclass(frozen=True)
class Record:
    """One number of an evaluation, with the parts of its name."""

    dataset: str
    language: str
    task: str
    metric: str
    params: Mapping[str, str | int]
    value: float
    ci95: tuple[float, float]
    n: int
    spec: Spec

    @property
    def key(self) -> str:
        """`<task>/<metric>`."""
        return f"{self.task}/{self.metric}"

    @property
    def name(self) -> str:
        """The key in results.json."""
        return f"{self.dataset}/{self.language}/{self.key}"

    @property
    def group(self) -> str:
        """The heading of its row's group."""
        return self.spec.group.format(**self.params)

    def label(self, templates: Sequence[str] = ()) -> str:
        """Return the label of its row: the text of the template if the field `template` is an index in `templates`."""
        template = self.params.get("template")
        if isinstance(template, int) and template < len(templates):
            return templates[template]
        return self.spec.label.format(**self.params)


def records_of(metrics: Mapping[str, Metric], specs: Iterable[Spec]) -> list[Record]:
    """Return metrics as records, in order. Of several matching specs the most exact is taken.

    A name that matches no spec is its own label.
    """
    specs = tuple(specs)
    records = []
    for name, metric in metrics.items():
        dataset, language, task, measure = name.rsplit("/", 3)
        key = f"{task}/{measure}"
        matching = [(spec, params) for spec in specs if (params := spec.fields(key)) is not None]
        unknown = Spec(pattern=key, label=key.replace("{", "{{").replace("}", "}}"))
        spec, params = max(matching, key=lambda pair: _compiled(pair[0].pattern)[2], default=(unknown, {}))
        records.append(Record(dataset, language, task, measure, params, metric.value, metric.ci95, metric.n, spec))
    return records


class Measured(NamedTuple):
    """The model that was measured."""

    name: str  # the path, Hub id or spec that the user gave
    fingerprint: str  # of all that its embeddings depend on (`koclip.encoders.base.Encoder`)


def write_results(
    path: Path, model: Measured, data: dict[str, Any], metrics: dict[str, Metric], environment: dict[str, Any]
) -> None:
    """Write results.json: the model, the data, the metrics and the environment, each with keys in alphabetical order.

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
    results = {name: ordered[name] for name in results}  # the sections keep this order
    storage.replace_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
