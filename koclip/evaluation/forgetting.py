"""What a model has kept of its source, what it has forgotten and what it has gained.

Both models answer the same queries, so the differences are paired: query by query, with intervals that resample images
with all their captions. Compared are the main numbers whose chance level is known (`Metric.chance`). If the interval of
the source includes the chance level, the source cannot do the task, for example because it does not read the language;
then there is a gain, but no share that was kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from koclip.evaluation.results import MAIN, Record, Spec, records_of
from koclip.metrics import Metric, gained, kept

HEADING = "What was forgotten"
_CHANCE, _SOURCE, _GAIN, _KEPT = "chance_", "source_", "gain_", "kept_"  # before the name of the task
_LABELS = {_CHANCE: "chance", _SOURCE: "source", _GAIN: "minus the source", _KEPT: "kept of the source"}


def specs_of(specs: Iterable[Spec]) -> tuple[Spec, ...]:
    """Return the specs of the comparisons of all main shares."""
    return tuple(
        replace(
            spec,
            pattern=f"{prefix}{spec.pattern}",
            label=f"{spec.label}, {label}",
            unit="points" if prefix == _GAIN else "percent",
            group=HEADING,
            params={**spec.params, "compared": prefix},
            summary="",
            chart=("", ""),
            card="",
            headline={},
            watched=False,
        )
        for spec in specs
        if spec.unit == "percent" and spec.group == MAIN
        for prefix, label in _LABELS.items()
    )


def comparable(metrics: Mapping[str, Metric], specs: Iterable[Spec]) -> list[Record]:
    """Return the records that are compared: the main numbers whose chance level is known."""
    return [
        record
        for record in records_of(metrics, specs)
        if record.group == MAIN and metrics[record.name].chance is not None
    ]


def compare(source: Mapping[str, Metric], model: Mapping[str, Metric], specs: Iterable[Spec]) -> dict[str, Metric]:
    """Return the comparison of a model's metrics with its source's, both of `evaluate` on the same sets.

    Names are `<data set>/<language>/<prefix><task>/<metric>`. `source_`: the source's number. `chance_`: the number of
    random answers. `gain_`: the model's number minus the source's, paired. `kept_`: the model's number as a share of
    the source's, paired; it is left out if the source is at chance.
    """
    compared: dict[str, Metric] = {}
    for record in comparable(source, specs):
        before, after = source[record.name], model.get(record.name)
        if after is None or before.chance is None:
            continue
        numbers = {_SOURCE: before, _CHANCE: Metric(before.chance, (before.chance, before.chance), before.n)}
        numbers[_GAIN] = gained(before, after)
        if before.ci95[0] > before.chance:
            numbers[_KEPT] = kept(before, after)
        start = f"{record.dataset}/{record.language}"
        compared |= {f"{start}/{prefix}{record.key}": metric for prefix, metric in numbers.items()}
    return compared


class Comparison(NamedTuple):
    """One number of the source and of the model."""

    source: Record
    chance: Record
    model: Record
    gain: Record
    kept: Record | None  # None: the source is at chance


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Return the comparisons among a model's records, in order."""
    by_name = {record.name: record for record in records}
    rows = []
    for record in records:
        if record.params.get("compared") != _SOURCE:
            continue
        start, key = f"{record.dataset}/{record.language}/", record.key.removeprefix(_SOURCE)
        chance, gain = (by_name[f"{start}{prefix}{key}"] for prefix in (_CHANCE, _GAIN))
        rows.append(Comparison(record, chance, by_name[start + key], gain, by_name.get(f"{start}{_KEPT}{key}")))
    return rows
