"""Charts of a model's numbers on a data set, with 95 % intervals, and the style of all pictures."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from koclip import storage
from koclip.evaluation.report.table import percent
from koclip.evaluation.results import Record
from koclip.metrics import KS, Metric
from koclip.text.korean.stress import STRESSES

COLOURS = {"ko": "#2f6db5", "en": "#d9822b"}
OTHER_COLOUR = "#4b9b6e"
MORE_COLOURS = ("#7a4fa3", "#2a9d8f", "#8c6d46", "#c0507e", "#5b6470", "#9aa62b")  # of corruptions
GREY = "#c9ced6"
WORSE = "#b5432f"  # of a loss whose interval excludes 0, and of a rank that is not 1
_DPI = 110
_EXAMPLE = "고양이가 논다"  # shown rewritten
_INVISIBLE = "nfd"  # a rewrite that looks the same


class Numbers(NamedTuple):
    """The data of a chart: a model's records on a data set."""

    name: str  # of the data set
    records: Sequence[Record]  # those of the chart
    templates: Mapping[str, Sequence[str]]  # texts by language

    def of(self, part: str, language: str | None = None, **params: str | int) -> list[Record]:
        """Return the records of a part of the chart (`Spec.chart`) in a language (default: all) with these params."""
        return [
            record
            for record in self.records
            if record.spec.chart[1] == part
            and language in (None, record.language)
            and all(record.params[name] == value for name, value in params.items())
        ]

    def languages(self, part: str) -> list[str]:
        """Return the languages with records of a part."""
        return list(dict.fromkeys(record.language for record in self.of(part)))


def charts(
    dataset: str, records: Sequence[Record], templates: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Figure]]:
    """Yield (kind, chart) for every chart that a model's records on a data set allow."""
    own = [record for record in records if record.dataset == dataset and record.spec.chart[0]]
    for kind in dict.fromkeys([*_CHARTS, *(record.spec.chart[0] for record in own)]):
        numbers = Numbers(dataset, [record for record in own if record.spec.chart[0] == kind], templates)
        draw = _CHARTS.get(kind)
        figure = (draw(numbers) if draw else _plain(numbers, kind)) if numbers.records else None
        if figure is not None:
            yield kind, figure


def _recalls(numbers: Numbers) -> Figure:
    """Draw recall at 1, 5 and 10 in both directions."""
    directions = list(dict.fromkeys(str(record.params["direction"]) for record in numbers.records))
    figure = Figure(figsize=(4.2 * len(directions), 3.6), layout="constrained")
    axes = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    for axis, direction in zip(axes, directions, strict=True):
        languages = list(dict.fromkeys(record.language for record in numbers.of("", direction=direction)))
        width = 0.8 / len(languages)
        for number, language in enumerate(languages):
            recalls = {record.params["k"]: record for record in numbers.of("", language, direction=direction)}
            places = [place + (number - (len(languages) - 1) / 2) * width for place in range(len(KS))]
            _bars(axis, places, [recalls[k] for k in KS], width, language)
        axis.set(title=direction, xticks=range(len(KS)), xticklabels=[f"R@{k}" for k in KS])
        axis.set(ylim=(0, 109), yticks=range(0, 101, 20))
    figure.axes[0].set_ylabel("%")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{numbers.name}: recall")
    return figure


def _templates(numbers: Numbers) -> Figure | None:
    """Draw the gain of each template, and of all together, over the bare name."""
    languages = numbers.languages("gain")
    if not languages:
        return None
    most = max(len(numbers.of("gain", language)) for language in languages)
    figure = Figure(figsize=(8.0, (0.24 * most + 1.2) * len(languages)), layout="constrained")
    for axis, language in zip(figure.subplots(len(languages), 1, squeeze=False)[:, 0], languages, strict=True):
        texts = numbers.templates.get(language, [])
        gains: dict[str, Record | Metric] = {record.label(texts): record for record in numbers.of("gain", language)}
        ordered = sorted(gains.items(), key=lambda gain: gain[1].value)
        for bare in numbers.of("bare", language):
            low, high = bare.ci95
            ordered.append(("all together", Metric(-bare.value, (-high, -low), bare.n)))
        _points(axis, [name for name, _ in ordered], [gain for _, gain in ordered], language)
        axis.set(title=language, xlabel="accuracy minus that of the bare name, percentage points")
    figure.suptitle(f"{numbers.name}: gain by templates")
    return figure


def _stress(numbers: Numbers) -> Figure | None:
    """Draw recall of each rewrite over the recall of the original captions, the largest loss first."""
    worst_first = sorted(numbers.of("lost", k=10), key=lambda record: record.value)  # drawn from below
    order = [str(record.params["rewrite"]) for record in worst_first]
    if not order:
        return None
    figure = Figure(figsize=(9.6, 0.44 * len(order) + 1.3), layout="constrained")
    for axis, k in zip(figure.subplots(1, 2, sharey=True), (10, 1), strict=True):
        kept = {record.params["rewrite"]: record for record in numbers.of("kept", k=k)}
        lost = {record.params["rewrite"]: record for record in numbers.of("lost", k=k)}
        _losses(axis, k, [kept[name] for name in order], [lost[name] for name in order])
    figure.axes[0].set_yticks(range(len(order)), [_rewritten(name) for name in order], linespacing=1.3)
    figure.suptitle(f"{numbers.name}: recall by rewritten Korean captions; red: a loss whose interval excludes 0")
    return figure


def _shifts(numbers: Numbers) -> Figure | None:
    """Draw accuracy over the severity of corruptions, and on shifted sets next to the original set."""
    languages = numbers.languages("base")
    drawn = [draw for part, draw in (("severity", _severities), ("shifted", _shifted)) if numbers.of(part)]
    if not languages or not drawn:
        return None
    figure = Figure(figsize=(4.4 * len(languages) + 0.4, 3.2 * len(drawn) + 0.4), layout="constrained")
    axes = figure.subplots(len(drawn), len(languages), squeeze=False, sharey="row")
    for row, draw in zip(axes, drawn, strict=True):
        row[0].set_ylabel("accuracy, %")
        for axis, language in zip(row, languages, strict=True):
            draw(axis, numbers, language)
            axis.axhline(100 * numbers.of("base", language)[0].value, color="grey", linestyle=":")
        row[0].set_ylim(0, 1.08 * row[0].get_ylim()[1])  # room for numbers
    figure.suptitle(f"{numbers.name}: accuracy under shift")
    return figure


def _shots(numbers: Numbers) -> Figure | None:
    """Draw the few-shot probe over the number of images, with zero-shot accuracy and the probe on all images."""
    few = numbers.of("few")
    if not few:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    counts = [record.params["shots"] for record in few]
    axis.errorbar(counts, percents(few), whiskers(few), marker="o", capsize=3, color="black", label="few-shot probe")
    lines = {f"zero-shot, {record.language}": record for record in numbers.of("zero-shot")}
    on_all_images = [("linear probe on all images", record) for record in numbers.of("all images")]
    for label, record in [*lines.items(), *on_all_images]:
        low, high = record.ci95
        axis.axhline(100 * record.value, color=colour(record.language), linestyle="--", label=label)
        axis.axhspan(100 * low, 100 * high, color=colour(record.language), alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set(xlabel="images per class", ylabel="accuracy, %", title=f"{numbers.name}: few-shot probe")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plain(numbers: Numbers, kind: str) -> Figure:
    """Draw bars of all numbers, by label and language: the chart of a kind without its own function."""
    labels = list(dict.fromkeys(record.label() for record in numbers.records))
    languages = list(dict.fromkeys(record.language for record in numbers.records))
    figure = Figure(figsize=(1.6 * len(labels) + 2.4, 3.6), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(languages)
    for number, language in enumerate(languages):
        own = [record for record in numbers.records if record.language == language]
        places = [labels.index(record.label()) + (number - (len(languages) - 1) / 2) * width for record in own]
        _bars(axis, places, own, width, language)
    axis.set(xticks=range(len(labels)), xticklabels=labels)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{numbers.name}: {kind}")
    return figure


def _severities(axis: Any, numbers: Numbers, language: str) -> None:
    """Draw a curve for each corruption, from severity 0, the original images."""
    base = numbers.of("base", language)[0]
    names = list(dict.fromkeys(record.params["name"] for record in numbers.of("severity", language)))
    for number, name in enumerate(names):
        corrupted = numbers.of("severity", language, name=name)
        apart = 0.06 * (number - (len(names) - 1) / 2)  # intervals must not cover each other
        places = [apart, *(int(record.params["severity"]) + apart for record in corrupted)]
        options = {"marker": "o", "markersize": 4, "capsize": 2, "color": MORE_COLOURS[number % len(MORE_COLOURS)]}
        metrics = [base, *corrupted]
        axis.errorbar(places, percents(metrics), whiskers(metrics), label=name, **options)
    axis.set(title=f"{language}: corruptions", xlabel="severity (0: original)")
    axis.legend(frameon=False, loc="lower left")


def _shifted(axis: Any, numbers: Numbers, language: str) -> None:
    """Draw a bar for the original set and for each shifted set."""
    bars = [*numbers.of("base", language), *numbers.of("shifted", language)]
    names = [record.params["name"] or numbers.name for record in bars]
    _bars(axis, range(len(bars)), bars, 0.6, language)
    axis.set(title=f"{language}: shifted sets")
    axis.set_xticks(range(len(bars)), names, rotation=20 if len(names) > 4 else 0)


def _losses(axis: Any, k: int, kept: Sequence[Record | Metric], lost: Sequence[Record | Metric]) -> None:
    """Draw horizontal bars of recall for each rewrite over the recall of the original captions; label each loss."""
    plain = 100 * (kept[0].value + lost[0].value)
    places = range(len(kept))
    colours = [WORSE if loss.ci95[0] > 0 else colour("ko") for loss in lost]
    axis.barh(places, [plain] * len(kept), color=GREY, height=0.62)
    axis.barh(places, percents(kept), color=colours, height=0.62)
    below, above = whiskers(lost)[::-1]  # a larger loss is a lower recall
    axis.errorbar(percents(kept), places, xerr=[below, above], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axis.axvline(plain, color="black", linewidth=1)
    end = max(plain, *(value + more for value, more in zip(percents(kept), above, strict=True)), 1.0)
    for place, loss in zip(places, lost, strict=True):
        value, high, low = (percent(-share) for share in (loss.value, *loss.ci95))
        axis.text(1.06 * end, place, f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", va="center", fontsize=8)
    axis.set(title=f"R@{k}: {plain:.1f} % by the original captions", xlabel="%", xlim=(0, 1.65 * end))


def _bars(axis: Any, places: Sequence[float], metrics: Sequence[Record | Metric], width: float, language: str) -> None:
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


def _points(axis: Any, names: Sequence[str], gains: Sequence[Record | Metric], language: str) -> None:
    """Draw differences as dots with intervals; those whose interval contains 0 are pale."""
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
    """Return the name of a rewrite with an example."""
    example = STRESSES[name](_EXAMPLE, 0) if name in STRESSES and name != _INVISIBLE else _EXAMPLE
    return f"{name}\n{example}" if example != _EXAMPLE else name


@contextmanager
def korean_style() -> Iterator[None]:
    """Draw with NanumGothic of koreanize-matplotlib, because matplotlib's fonts lack Hangul; `$` starts no formula."""
    package = importlib.util.find_spec("koreanize_matplotlib")
    folders: Sequence[str] = (package.submodule_search_locations or []) if package else []
    for folder in folders:
        font_manager.fontManager.addfont(str(Path(folder) / "fonts" / "NanumGothic.ttf"))
    fonts = ["NanumGothic", "DejaVu Sans"] if folders else ["DejaVu Sans"]
    options: dict[Any, Any] = {
        "font.family": fonts,
        "font.size": 9.5,
        "text.parse_math": False,
        "axes.unicode_minus": False,  # NanumGothic lacks it
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(options):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a picture, and create its folder."""
    with storage.atomic(path) as partial:
        figure.savefig(partial, dpi=_DPI, facecolor="white")


def colour(language: str) -> str:
    """Return the colour of a language in every picture."""
    return COLOURS.get(language, OTHER_COLOUR)


def whiskers(metrics: Sequence[Record | Metric]) -> Any:
    """Return the 95 % intervals in percent as matplotlib takes error bars: [below, above]."""
    below = [100 * max(0.0, metric.value - metric.ci95[0]) for metric in metrics]
    above = [100 * max(0.0, metric.ci95[1] - metric.value) for metric in metrics]
    return [below, above]


def percents(metrics: Sequence[Record | Metric]) -> list[float]:
    """Return values in percent."""
    return [100 * metric.value for metric in metrics]


_CHARTS: dict[str, Callable[[Numbers], Figure | None]] = {
    "recall": _recalls,
    "stress": _stress,
    "templates": _templates,
    "shift": _shifts,
    "shots": _shots,
}
