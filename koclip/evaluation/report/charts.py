"""Pictures of one model's metrics on one data set: bars and curves with 95 % intervals."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from koclip.evaluation.report.drawing import FEWER, GREY, MORE_COLOURS, colour, percents, whiskers
from koclip.evaluation.report.table import percent, split
from koclip.metrics import KS, Metric
from koclip.text.korean.stress import STRESSES

_EXAMPLE = "고양이가 논다"  # what a rewrite does is shown on it
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
        axis.set(ylim=(0, 109), yticks=range(0, 101, 20))
    figure.axes[0].set_ylabel("%")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
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
    for axis, (k, lost) in zip(figure.subplots(1, 2, sharey=True), drops.items(), strict=True):
        kept = numbers.family("ko", rf"stress_(.+)/recall@{k}")
        _losses(axis, k, [kept[name] for name in order], [lost[name] for name in order])
    figure.axes[0].set_yticks(range(len(order)), [_rewritten(name) for name in order], linespacing=1.3)
    figure.suptitle(f"{numbers.name}: recall by rewritten Korean captions; red: less, and the interval excludes 0")
    return figure


def shifts(numbers: Numbers) -> Figure | None:
    """Draw accuracy over the severity of corruptions, and on shifted sets next to the set itself."""
    languages = numbers.having(r"(shift_none)/accuracy")
    if not languages:
        return None
    kinds = {_severities: r"shift_(.+)/accuracy_severity_\d+", _shifted: r"shift_(?!none/)(.+)/accuracy"}
    drawn = [draw for draw, pattern in kinds.items() if numbers.having(pattern)]
    if not drawn:
        return None
    figure = Figure(figsize=(4.4 * len(languages) + 0.4, 3.2 * len(drawn) + 0.4), layout="constrained")
    axes = figure.subplots(len(drawn), len(languages), squeeze=False, sharey="row")
    for row, draw in zip(axes, drawn, strict=True):
        row[0].set_ylabel("accuracy, %")
        for axis, language in zip(row, languages, strict=True):
            draw(axis, numbers, language)
            axis.axhline(100 * numbers.metrics[language]["shift_none/accuracy"].value, color="grey", linestyle=":")
        row[0].set_ylim(0, 1.08 * row[0].get_ylim()[1])  # room for numbers
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
    """Draw a curve for each corruption, starting at the set as it is."""
    base = numbers.metrics[language]["shift_none/accuracy"]
    names = list(numbers.family(language, r"shift_(.+)/accuracy_severity_1"))
    for number, name in enumerate(names):
        found = numbers.family(language, rf"shift_{re.escape(name)}/accuracy_severity_(\d+)")
        metrics = [base, *found.values()]
        apart = 0.06 * (number - (len(names) - 1) / 2)  # so that intervals do not hide each other
        places = [apart, *(int(severity) + apart for severity in found)]
        options = {"marker": "o", "markersize": 4, "capsize": 2, "color": MORE_COLOURS[number % len(MORE_COLOURS)]}
        axis.errorbar(places, percents(metrics), whiskers(metrics), label=name, **options)
    axis.set(title=f"{language}: corruptions", xlabel="severity (0: as it is)")
    axis.legend(frameon=False, loc="lower left")


def _shifted(axis: Any, numbers: Numbers, language: str) -> None:
    """Draw a bar for the set itself and for each shifted one."""
    found = numbers.family(language, r"shift_(.+)/accuracy")
    names = [numbers.name if name == "none" else name for name in found]
    _bars(axis, range(len(found)), list(found.values()), 0.6, language)
    axis.set(title=f"{language}: shifted sets")
    axis.set_xticks(range(len(found)), names, rotation=20 if len(names) > 4 else 0)


def _losses(axis: Any, k: int, kept: Sequence[Metric], lost: Sequence[Metric]) -> None:
    """Draw recall from below in front of that by the captions as they are, with the change in points at its side."""
    plain = 100 * (kept[0].value + lost[0].value)
    places = range(len(kept))
    colours = [FEWER if loss.ci95[0] > 0 else colour("ko") for loss in lost]
    axis.barh(places, [plain] * len(kept), color=GREY, height=0.62)
    axis.barh(places, percents(kept), color=colours, height=0.62)
    below, above = whiskers(lost)[::-1]  # a larger loss is a lower recall
    axis.errorbar(percents(kept), places, xerr=[below, above], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axis.axvline(plain, color="black", linewidth=1)
    end = max(plain, *(value + more for value, more in zip(percents(kept), above, strict=True)), 1.0)
    for place, loss in zip(places, lost, strict=True):
        value, high, low = (percent(-one) for one in (loss.value, *loss.ci95))
        axis.text(1.06 * end, place, f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", va="center", fontsize=8)
    axis.set(title=f"R@{k}: {plain:.1f} % by the captions as they are", xlabel="%", xlim=(0, 1.65 * end))


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


_CHARTS: dict[str, Callable[[Numbers], Figure | None]] = {
    "recall": recalls,
    "stress": stress,
    "templates": templates,
    "shift": shifts,
    "shots": shots,
}
