"""Metrics as rows that people read: which number stands where, by which name, in which unit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from koclip.metrics import Metric

MAIN = ""  # the group of rows that a reader needs first
_NAMES = {
    "text_to_image/recall@1": "text to image, R@1",
    "text_to_image/recall@5": "text to image, R@5",
    "text_to_image/recall@10": "text to image, R@10",
    "text_to_image/median_rank": "text to image, median rank",
    "image_to_text/recall@1": "image to text, R@1",
    "image_to_text/recall@5": "image to text, R@5",
    "image_to_text/recall@10": "image to text, R@10",
    "image_to_text/median_rank": "image to text, median rank",
    "zero_shot/accuracy": "zero-shot accuracy",
    "zero_shot/mean_per_class": "zero-shot, mean over classes",
    "zero_shot/accuracy@5": "zero-shot, among the first 5",
    "zero_shot_single/gain_over_ensemble": "first template less all",
    "zero_shot_name/gain_over_ensemble": "bare name less all templates",
    "zero_shot_particles/gain": "right particles less spelt out",
    "zero_shot_described/gain": "described names less plain",
    "zero_shot_described/gain_ambiguous": "the same, ambiguous names",
    "languages/gap@1": "R@1, first less second language",
    "languages/gap@10": "R@10, first less second language",
    "languages/same_image": "same nearest image in both",
    "linear_probe/accuracy": "linear probe",
    "linear_probe/mean_per_class": "linear probe, mean over classes",
    "agreement/kendall_tau_c": "agreement with people, tau c",
    "agreement/kendall_tau_b": "agreement with people, tau b",
    "shift_none/accuracy": "accuracy without shift",
}
# Names that hold a number or a name of their own: what they look like, their group and what they are called there.
_FAMILIES = (
    (r"shift_(.+)/drop", MAIN, r"accuracy lost, \1"),
    (r"shift_(.+)/effective_robustness", MAIN, r"effective robustness, \1"),
    (r"few_shot/accuracy_0*(\d+)_shots", MAIN, r"probe on \1 per class"),
    (r"(.+)_first_caption/(.+)", "Each image's first caption only", r"\1/\2"),
    (r"stress_(.+)/drop@(\d+)", r"R@\2 lost by rewritten captions", r"\1"),
    (r"stress_(.+)/recall@(\d+)", r"R@\2 of rewritten captions", r"\1"),
    (r"stress_(.+)/changed", "Captions that a rewrite changes", r"\1"),
    (r"zero_shot_template_(\d+)/accuracy", "Each template alone, accuracy", r"template \1"),
    (r"zero_shot_template_(\d+)/gain_over_name", "Each template alone, less the bare name", r"template \1"),
    (r"zero_shot_(.+)/accuracy", "Accuracy by kind of prompt", r"\1"),
    (r"shift_(.+)/accuracy_severity_(\d+)", "Accuracy under shift", r"\1, severity \2"),
    (r"shift_(.+)/accuracy", "Accuracy under shift", r"\1"),
    (r"(.+)/accuracy", MAIN, r"\1, accuracy"),
)
_POINTS = ("gain", "drop", "gap", "effective_robustness")


@dataclass(frozen=True)
class Cell:
    """A metric as text. `marked` says that a difference's interval excludes 0; `share` is 0 to 1 where it is one."""

    value: str
    interval: str
    marked: bool = False
    share: float | None = None
    note: str = ""

    def __str__(self) -> str:
        """Return all of it in one line."""
        return f"{self.value} ({self.interval})" + (" *" if self.marked else "") + (f" {self.note}" * bool(self.note))


@dataclass(frozen=True)
class Line:
    """One row: what was measured, in which language, on how many queries, and each model's number."""

    key: str  # <task>/<metric>
    language: str
    label: str
    n: int
    cells: list[Cell | None]  # by model


@dataclass
class Section:
    """One data set's rows, by group; the group `MAIN` comes first, and no group is empty."""

    name: str
    groups: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def main(self) -> list[Line]:
        """Rows that a reader needs first."""
        return self.groups.get(MAIN, [])

    @property
    def details(self) -> dict[str, list[Line]]:
        """The other rows, by group."""
        return {name: lines for name, lines in self.groups.items() if name != MAIN}


def split(name: str) -> tuple[str, str, str]:
    """Return data set, language and <task>/<metric> of a metric's name."""
    data, language, task, metric = name.rsplit("/", 3)
    return data, language, f"{task}/{metric}"


def place(key: str) -> tuple[str, str]:
    """Return the group and the label of <task>/<metric>."""
    if key in _NAMES:
        return MAIN, _NAMES[key]
    for pattern, group, label in _FAMILIES:
        match = re.fullmatch(pattern, key)
        if match:
            expanded = match.expand(label)
            return match.expand(group), _NAMES.get(expanded, expanded)
    return MAIN, key


def cell(key: str, metric: Metric, note: str = "") -> Cell:
    """Return a metric as text: a share in percent, a difference in signed percentage points, others as they are."""
    measure = key.rpartition("/")[2]
    (low, high), value = metric.ci95, metric.value
    if measure.startswith(_POINTS):
        interval = f"{percent(low):+.1f} to {percent(high):+.1f}"
        return Cell(f"{percent(value):+.1f}", interval, low > 0 or high < 0, note=note)
    if measure == "median_rank":
        return Cell(f"{value:,.0f}", f"{low:,.0f} to {high:,.0f}", note=note)
    if measure.startswith("kendall"):
        return Cell(f"{value:.3f}", f"{low:.3f} to {high:.3f}", note=note)
    return Cell(f"{percent(value):.1f}", f"{percent(low):.1f} to {percent(high):.1f}", share=value, note=note)


def sections(
    metrics: Sequence[Mapping[str, Metric]], templates: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[Section]:
    """Return the rows of every data set, in the order in which the metrics name them.

    Args:
        metrics: Each model's, by name.
        templates: The text of each template, by data set and language.
    """
    found: dict[str, Section] = {}
    for name in dict.fromkeys(name for one in metrics for name in one):
        data, language, key = split(name)
        group, label = place(key)
        number = re.fullmatch(r"zero_shot_template_(\d+)/.+", key)
        texts = templates.get(data, {}).get(language, [])
        if number and int(number[1]) < len(texts):
            label = texts[int(number[1])]
        there = [one.get(name) for one in metrics]
        cells = [cell(key, metric) if metric else None for metric in there]
        count = max(metric.n for metric in there if metric)
        section = found.setdefault(data, Section(data))
        section.groups.setdefault(group, []).append(Line(key, language, label, count, cells))
    for section in found.values():
        section.groups.setdefault(MAIN, []).extend(_worst(section.name, metrics))
        section.groups[MAIN] = _ordered(section.main)
    return list(found.values())


def _ordered(lines: Sequence[Line]) -> list[Line]:
    """Return lines by language, in the order of `_NAMES`, all others behind."""
    order = {key: number for number, key in enumerate(_NAMES)}
    languages = list(dict.fromkeys(line.language for line in lines))
    return sorted(lines, key=lambda line: (languages.index(line.language), order.get(line.key, len(order))))


def _worst(data: str, metrics: Sequence[Mapping[str, Metric]]) -> list[Line]:
    """Return rows with the largest loss that each model suffers from a rewrite of captions, with the rewrite's name."""
    lines = []
    for k in (1, 10):
        pattern = re.compile(rf"{re.escape(data)}/ko/stress_(.+)/drop@{k}")
        drops = [[(match[1], one[name]) for name in one if (match := pattern.fullmatch(name))] for one in metrics]
        worst = [max(one, key=lambda drop: drop[1].value) if one else None for one in drops]
        cells = [cell("drop", drop[1], drop[0]) if drop else None for drop in worst]
        count = max((drop[1].n for drop in worst if drop), default=0)
        if count:
            lines.append(Line(f"stress/drop@{k}", "ko", f"R@{k} lost, worst rewrite", count, cells))
    return lines


def percent(share: float) -> float:
    """Return a share in percent, to a tenth."""
    return round(100 * share, 1) or 0.0  # no -0.0
