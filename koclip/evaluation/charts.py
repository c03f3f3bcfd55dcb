"""Pictures of one model's metrics on one data set: bars and curves with 95 % intervals."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from koclip.evaluation.drawing import FEWER, GREY, colour, percents, whiskers
from koclip.evaluation.tables import split
from koclip.metrics import KS, Metric
from koclip.text.stress import STRESSES

_EXAMPLE = "고양이가 부엌에서 논다"  # what a rewrite does is shown on it
_INVISIBLE = "nfd"  # a rewrite that cannot be seen


@dataclass(frozen=True)
class Numbers:
    """One model's metrics on one data set, by language and <task>/<metric>; template texts by language."""

    name: str
    metrics: dict[str, dict[str, Metric]]
    templates: Mapping[str, Sequence[str]]

    def family(self, language: str, pattern: str) -> dict[str, Metric]:
        """Return the metrics that a pattern fits, by what it catches."""
        found = self.metrics.get(language, {}).items()
        return {match[1]: metric for key, metric in found if (match := re.fullmatch(pattern, key))}

    def having(self, pattern: str) -> list[str]:
        """Return the languages that have such metrics."""
        return [language for language in self.metrics if self.family(language, pattern)]


def numbers_of(
    data: str, metrics: Mapping[str, Metric], templates: Mapping[str, Mapping[str, Sequence[str]]]
) -> Numbers:
    """Return what a model's metrics say of one data set."""
    found: dict[str, dict[str, Metric]] = {}
    for name, metric in metrics.items():
        owner, language, key = split(name)
        if owner == data:
            found.setdefault(language, {})[key] = metric
    return Numbers(data, found, templates.get(data, {}))


def charts(numbers: Numbers) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures that the metrics allow, by kind."""
    for kind, draw in _CHARTS.items():
        figure = draw(numbers)
        if figure is not None:
            yield kind, figure


def recalls(numbers: Numbers) -> Figure | None:
    """Draw recall at 1, 5 and 10 in both directions."""
    directions = {"text_to_image": "text to image", "image_to_text": "image to text"}
    shown = [one for one in directions if numbers.having(rf"({one})/recall@\d+")]
    if not shown:
        return None
    figure = Figure(figsize=(4.2 * len(shown), 3.6), layout="constrained")
    for axis, direction in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        languages = numbers.having(rf"({direction})/recall@\d+")
        width = 0.8 / len(languages)
        for number, language in enumerate(languages):
            found = numbers.family(language, rf"{direction}/recall@(\d+)")
            places = [place + (number - (len(languages) - 1) / 2) * width for place in range(len(KS))]
            _bars(axis, places, [found[str(k)] for k in KS], width, language)
        axis.set(title=directions[direction], xticks=range(len(KS)), xticklabels=[f"R@{k}" for k in KS])
        axis.set_ylim(0, 100)
        axis.legend(frameon=False, loc="upper left")
    figure.axes[0].set_ylabel("%")
    figure.suptitle(f"{numbers.name}: recall")
    return figure


def templates(numbers: Numbers) -> Figure | None:
    """Draw what each template alone, and all together, gain over the bare name."""
    pattern = r"zero_shot_template_(\d+)/gain_over_name"
    languages = numbers.having(pattern)
    if not languages:
        return None
    most = max(len(numbers.family(language, pattern)) for language in languages)
    figure = Figure(figsize=(8.0, (0.24 * most + 1.2) * len(languages)), layout="constrained")
    for axis, language in zip(figure.subplots(len(languages), 1, squeeze=False)[:, 0], languages, strict=True):
        texts = numbers.templates.get(language, [])
        gains = {
            (texts[int(number)] if int(number) < len(texts) else f"template {number}"): gain
            for number, gain in numbers.family(language, pattern).items()
        }
        bare = numbers.metrics[language].get("zero_shot_name/gain_over_ensemble")
        ordered = sorted(gains.items(), key=lambda one: one[1].value)
        if bare:
            low, high = bare.ci95
            ordered.append(("all together", Metric(-bare.value, (-high, -low), bare.n)))
        _points(axis, [name for name, _ in ordered], [gain for _, gain in ordered], language)
        axis.set(title=language, xlabel="accuracy less that of the bare name, percentage points")
    figure.suptitle(f"{numbers.name}: what templates gain")
    return figure


def stress(numbers: Numbers) -> Figure | None:
    """Draw recall by rewritten captions in front of that by the captions themselves, the worst first."""
    drops = {k: numbers.family("ko", rf"stress_(.+)/drop@{k}") for k in (10, 1)}
    if not drops[10]:
        return None
    order = sorted(drops[10], key=lambda name: drops[10][name].value)  # drawn from below
    figure = Figure(figsize=(9.6, 0.44 * len(order) + 1.3), layout="constrained")
    for axis, (k, lost) in zip(figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1]), drops.items(), strict=True):
        kept = numbers.family("ko", rf"stress_(.+)/recall@{k}")
        plain = 100 * (kept[order[0]].value + lost[order[0]].value)
        axis.barh(order, [plain] * len(order), color=GREY, height=0.62)
        sure = [lost[name].ci95[0] > 0 for name in order]
        values = percents([kept[name] for name in order])
        axis.barh(order, values, color=[FEWER if one else colour("ko") for one in sure], height=0.62)
        intervals = whiskers([lost[name] for name in order])[::-1]  # a larger loss is a lower recall
        axis.errorbar(values, order, xerr=intervals, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axis.axvline(plain, color="black", linewidth=1)
        room = 1.5 * plain if plain else 1.0
        for place, name in enumerate(order):
            low, high = (100 * value for value in lost[name].ci95)
            text = f"{-100 * lost[name].value:+.1f} [{-high:+.1f}, {-low:+.1f}]"
            axis.text(plain + 0.04 * room, place, text, va="center", fontsize=8, bbox=_clear())
        axis.set(title=f"R@{k}: {plain:.1f} % by the captions as they are", xlabel="%", xlim=(0, room))
    figure.axes[0].set_yticks(range(len(order)), [_rewritten(name) for name in order])
    figure.suptitle(
        f"{numbers.name}: recall by rewritten Korean captions, and the change in points (red: lost for sure)"
    )
    return figure


def shifts(numbers: Numbers) -> Figure | None:
    """Draw accuracy over the severity of corruptions, and on shifted sets next to the set itself."""
    languages = numbers.having(r"(shift_none)/accuracy")
    if not languages:
        return None
    curves = bool(numbers.having(r"shift_(.+)/accuracy_severity_\d+"))
    bars = bool(numbers.having(r"shift_(?!none/)(.+)/accuracy"))
    columns = curves + bars
    figure = Figure(figsize=(4.4 * columns + 0.6, 3.2 * len(languages) + 0.4), layout="constrained")
    for row, language in zip(figure.subplots(len(languages), columns, squeeze=False), languages, strict=True):
        if curves:
            _severities(row[0], numbers, language)
        if bars:
            found = numbers.family(language, r"shift_(.+)/accuracy")
            names = [name.replace("none", numbers.name) if name == "none" else name for name in found]
            _bars(row[-1], range(len(found)), list(found.values()), 0.6, language)
            row[-1].set(title=f"{language}: shifted sets", xticks=range(len(found)), xticklabels=names, ylabel="%")
            row[-1].set_ylim(0, _top([found]))
    figure.suptitle(f"{numbers.name}: accuracy under shift")
    return figure


def shots(numbers: Numbers) -> Figure | None:
    """Draw the probe on a few images per class against zero-shot accuracy and the probe on all images."""
    found = numbers.family("images", r"few_shot/accuracy_(\d+)_shots")
    if not found:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    counts = [int(count) for count in found]
    few = list(found.values())
    axis.errorbar(counts, percents(few), whiskers(few), marker="o", capsize=3, color="black", label="few-shot probe")
    lines = {f"zero-shot, {one}": (one, "zero_shot/accuracy") for one in numbers.having("(zero_shot)/accuracy")}
    lines |= {"linear probe on all images": ("images", "linear_probe/accuracy")}
    for label, (language, key) in lines.items():
        metric = numbers.metrics[language].get(key)
        if metric:
            axis.axhline(100 * metric.value, color=colour(language), linestyle="--", label=label)
            axis.axhspan(100 * metric.ci95[0], 100 * metric.ci95[1], color=colour(language), alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set(xlabel="images per class", ylabel="accuracy, %", title=f"{numbers.name}: few-shot probe")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _severities(axis: Any, numbers: Numbers, language: str) -> None:
    base = numbers.metrics[language]["shift_none/accuracy"]
    names = numbers.family(language, r"shift_(.+)/accuracy_severity_1")
    curves = [numbers.family(language, rf"shift_{re.escape(name)}/accuracy_severity_(\d)") for name in names]
    for name, found in zip(names, curves, strict=True):
        metrics = [base, *found.values()]
        severities = [0, *(int(severity) for severity in found)]
        axis.errorbar(severities, percents(metrics), whiskers(metrics), marker="o", markersize=4, capsize=2, label=name)
    axis.axhline(100 * base.value, color="grey", linestyle=":", linewidth=1)
    axis.set(title=f"{language}: corruptions", xlabel="severity (0: as it is)", ylabel="%")
    axis.set_ylim(0, _top([{"": base}, *curves]))
    axis.legend(frameon=False)


def _top(found: Sequence[Mapping[str, Metric]]) -> float:
    """Return where an axis in percent ends: above all intervals, with room for a number."""
    return min(112.0, 118 * max(metric.ci95[1] for one in found for metric in one.values()) + 1)


def _bars(axis: Any, places: Sequence[float], metrics: Sequence[Metric], width: float, language: str) -> None:
    """Draw upright bars with intervals and their values."""
    axis.bar(places, percents(metrics), width * 0.92, color=colour(language), label=language)
    axis.errorbar(places, percents(metrics), whiskers(metrics), fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for place, metric in zip(places, metrics, strict=True):
        axis.annotate(
            f"{100 * metric.value:.1f}",
            (place, 100 * metric.ci95[1]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )


def _points(axis: Any, names: Sequence[str], gains: Sequence[Metric], language: str) -> None:
    """Draw differences as dots with intervals around 0; those whose interval holds 0 are pale."""
    for place, gain in enumerate(gains):
        low, high = gain.ci95
        alpha = 1.0 if low > 0 or high < 0 else 0.4
        options = {"fmt": "o", "color": colour(language), "alpha": alpha, "capsize": 2}
        axis.errorbar([100 * gain.value], [place], xerr=whiskers([gain]), **options)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.grid(axis="x", color=GREY, linewidth=0.5)


def _rewritten(name: str) -> str:
    """Return a rewrite's name and what it does to an example."""
    example = STRESSES[name](_EXAMPLE, 0) if name in STRESSES and name != _INVISIBLE else _EXAMPLE
    return f"{name}\n{example}" if example != _EXAMPLE else name


def _clear() -> dict[str, Any]:
    return {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}


_CHARTS: dict[str, Callable[[Numbers], Figure | None]] = {
    "recall": recalls,
    "stress": stress,
    "templates": templates,
    "shift": shifts,
    "shots": shots,
}
