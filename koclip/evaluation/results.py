"""What an evaluation task is, what its numbers are called, and the numbers themselves as records.

A metric's name is `<data set>/<language>/<task>/<metric>`. Each task describes its names with `Spec`s. `records_of` is
the only code that reads a name; tables, charts, pages and cards read records.
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

MAIN = ""  # the group of rows that a reader needs first
IMAGES = "images"  # in the place of the language, for tasks that read no text

Unit = Literal["percent", "points", "rank", "number"]


@dataclass(frozen=True)
class Spec:
    """Describes the numbers whose names fit a pattern.

    Args:
        pattern: `<task>/<metric>` with fields in braces: `{rewrite}` is any text, `{k:d}` a whole number.
        label: What a row is called; may use the fields.
        unit: `percent` of a share, `points` for differences of shares, `rank` and `number` as they are.
        group: Rows that stand together, under this heading; `MAIN` comes first. May use the fields.
        params: Values of further fields, which the pattern does not hold.
        worst: The label of a main row that shows the largest number of all that differ in their fields.
        summary: What the number means, for the summary of report.html; default: it is not in there.
        chart: The picture that it is drawn in, and as what there. A new name gets a picture with bars.
        card: The heading that it stands under on the card; default: its language's, and only if it is a main number.
        headline: By language: its name in Korean, for the first lines of the card.
        hub_task: What the Hub calls the task.
        watched: Whether it is drawn over the steps of training.
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
        """Return the fields of `<task>/<metric>`; None if it does not fit the pattern."""
        regex, whole, _ = _compiled(self.pattern)
        match = regex.fullmatch(key)
        if match is None:
            return None
        values = {name: int(value) if name in whole else value for name, value in match.groupdict().items()}
        return {**self.params, **values}

    @property
    def exactness(self) -> int:
        """The number of letters of the pattern outside of its fields."""
        return _compiled(self.pattern)[2]


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], frozenset[str], int]:
    """Return the regular expression of a pattern, its fields that are whole numbers, and its letters outside fields."""
    regex, whole, letters = "", set(), 0
    for literal, name, kind, _ in Formatter().parse(pattern):
        regex += re.escape(literal)
        letters += len(literal)
        if name:
            regex += rf"(?P<{name}>\d+)" if kind == "d" else f"(?P<{name}>.+)"
            whole |= {name} if kind == "d" else set()
    return re.compile(regex), frozenset(whole), letters


class Task(NamedTuple):
    """Something that a model is asked to do on an evaluation set."""

    name: str  # in `sets[].tasks`
    run: Callable[[Embedder, EvalSet, str], dict[str, Metric]]  # in a language: metrics by <task>/<metric>
    languages: Callable[[EvalSet], Sequence[str]]  # that it can be run in
    specs: tuple[Spec, ...]
    check: Callable[[EvalSet], None] | None = None  # raises a ConfigError if the set does not suffice
    # By language, the numbers (C, C) of images by class and answer, which are drawn.
    confusions: Callable[[Embedder, EvalSet], Iterator[tuple[str, torch.Tensor]]] | None = None


@dataclass(frozen=True)
class Record:
    """One number of an evaluation, with what its name says."""

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
        """The heading that its row stands under."""
        return self.spec.group.format(**self.params)

    def label(self, templates: Sequence[str] = ()) -> str:
        """Return what its row is called; the field `template` is a place in `templates`, whose text is shown."""
        template = self.params.get("template")
        if isinstance(template, int) and template < len(templates):
            return templates[template]
        return self.spec.label.format(**self.params)


def records_of(metrics: Mapping[str, Metric], specs: Iterable[Spec]) -> list[Record]:
    """Return metrics as records, in their order. A name that fits no spec is its own label."""
    specs = tuple(specs)
    records = []
    for name, metric in metrics.items():
        dataset, language, task, measure = name.rsplit("/", 3)
        spec, params = _described(f"{task}/{measure}", specs)
        records.append(Record(dataset, language, task, measure, params, metric.value, metric.ci95, metric.n, spec))
    return records


def _described(key: str, specs: Sequence[Spec]) -> tuple[Spec, dict[str, str | int]]:
    """Return the most exact spec that a key fits, and the key's fields."""
    fitting = [(spec, params) for spec in specs if (params := spec.fields(key)) is not None]
    if fitting:
        return max(fitting, key=lambda pair: pair[0].exactness)
    return Spec(pattern=key, label=key.replace("{", "{{").replace("}", "}}")), {}


class Measured(NamedTuple):
    """The model that numbers are of."""

    name: str  # as it was given to koclip
    fingerprint: str  # of all that its embeddings depend on (`koclip.encoders.base.Encoder`)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
