"""The table and the chart of what a model has kept, forgotten and gained, compared with its source."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from koclip.evaluation.forgetting import HEADING, Comparison, comparisons
from koclip.evaluation.report.charts import GREY, WORSE, colour, percents
from koclip.evaluation.report.table import Cell, cell, console, escaped, markdown_table, percent
from koclip.evaluation.results import Record

COLUMNS = ("", "language", "n", "source", "model", "model minus source", "kept")
NOTE = (
    "Both models answer the same queries, so the differences are paired. Percent with 95 % intervals; differences in "
    "percentage points, * where the interval excludes 0. Kept: the model's number as a share of the source's. "
    "At chance: the interval of the source includes the number that random answers reach, so it has nothing to forget."
)


class Row(NamedTuple):
    """A number of the source and of the model, as text."""

    dataset: str
    label: str
    language: str
    n: int
    source: Cell
    model: Cell
    gain: Cell
    kept: Cell | None  # None: the source is at chance
    chance: str  # percent

    @property
    def kept_text(self) -> str:
        """What was kept, or that the source is at chance."""
        return str(self.kept) if self.kept else f"source at chance ({self.chance})"

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each column."""
        numbers = (str(number) for number in (self.source, self.model, self.gain))
        return (self.label, self.language, f"{self.n:,}", *numbers, self.kept_text)


def rows(records: Sequence[Record]) -> list[Row]:
    """Return the rows of a model's comparisons with its source; [] without a source."""
    return [_row(compared) for compared in comparisons(records)]


def _row(compared: Comparison) -> Row:
    model, kept = compared.model, compared.kept
    return Row(
        model.dataset,
        model.label(),
        model.language,
        model.n,
        source=cell(compared.source),
        model=cell(model),
        gain=cell(compared.gain),
        kept=cell(kept) if kept else None,
        chance=f"{percent(compared.chance.value):.1f}",
    )


def print_table(compared: Sequence[Row], model: str, source: str) -> None:
    """Print the rows of a model, by data set."""
    out = console()
    for name, own in itertools.groupby(compared, key=lambda row: row.dataset):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, heading in enumerate(COLUMNS):
            table.add_column(heading, justify="left" if number < 2 else "right")
        for _, lines in itertools.groupby(own, key=lambda row: row.language):
            for row in lines:
                values = row.source.value, row.model.value  # without intervals, which do not fit the terminal
                table.add_row(*map(Text, (*row.texts[:3], *values, *row.texts[5:])))
            table.add_section()
        out.print(Text(f"{HEADING}: {model} compared with its source {source}, on {name}", style="bold"))
        out.print(table)
    out.print(Text(NOTE, style="dim"))


def markdown(compared: Sequence[Row], model: str, source: str) -> str:
    """Return the rows of a model as a section of a Markdown page."""
    lines = [("data set", *COLUMNS), ("---", "---", "---", "--:", *["--:"] * 4)]
    lines += [(row.dataset, *row.texts) for row in compared]
    return f"## {HEADING}: {escaped(model)}\n\nThe source is {escaped(source)}. {NOTE}\n\n{markdown_table(lines)}\n"


def chart(records: Sequence[Record], dataset: str) -> Figure | None:
    """Draw the source's and the model's numbers on a data set; None without a source."""
    compared = [row for row in comparisons(records) if row.model.dataset == dataset]
    if not compared:
        return None
    compared.reverse()  # drawn from below
    figure = Figure(figsize=(8.4, 0.34 * len(compared) + 1.3), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(compared):
        before, after = percents([row.source, row.model])
        lost = row.gain.ci95[1] < 0
        drawn = WORSE if lost else colour(row.model.language)
        axis.plot([before, after], [place, place], color=drawn, linewidth=2)
        axis.plot([100 * row.chance.value], [place], marker="|", color="black", markersize=9)
        axis.plot([before], [place], marker="o", markerfacecolor="white", color=drawn)
        axis.plot([after], [place], marker="o", color=drawn)
        value, (low, high) = percent(row.gain.value), map(percent, row.gain.ci95)
        kept = "" if row.kept is None else f", kept {percent(row.kept.value):.1f} %"
        axis.text(103, place, f"{value:+.1f} [{low:+.1f}, {high:+.1f}]{kept}", va="center", fontsize=8)
    axis.set_yticks(range(len(compared)), [f"{row.model.label()} ({row.model.language})" for row in compared])
    axis.set(xlabel="%", xlim=(-2, 148), xticks=range(0, 101, 20), ylim=(-0.7, len(compared) - 0.3))
    axis.grid(axis="x", color=GREY, linewidth=0.5)
    figure.suptitle(f"{dataset}: the source (hollow), the model (filled), chance (bar); red: forgotten", fontsize=10)
    return figure
