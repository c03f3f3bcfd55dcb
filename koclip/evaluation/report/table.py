"""Tables of records, in Markdown and in the terminal."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from koclip.evaluation import forgetting
from koclip.evaluation.results import MAIN, Record, Spec
from koclip.evaluation.tasks import SPECS

NOTE = (
    "Percent with 95 % intervals. Differences are in percentage points, with a sign; * where the interval excludes 0. "
    "n: queries."
)
_WIDTH = 110  # columns, if there is no terminal
_LEFT = 52  # columns left of the numbers
_WIDE, _NARROW = 28, 16  # columns of a model's numbers in one line and in two lines
_MOST_WIDE = 2  # models in wide columns

Templates = Mapping[str, Mapping[str, Sequence[str]]]  # the text of each template, by data set and language


@dataclass(frozen=True)
class Cell:
    """A number as text."""

    value: str
    interval: str
    marked: bool = False  # whether it is a difference whose interval excludes 0
    share: float | None = None  # 0 to 1, for shares only
    note: str = ""

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.value} ({self.interval})" + (" *" if self.marked else "") + (f" {self.note}" * bool(self.note))


@dataclass(frozen=True)
class Line:
    """A row of a table: what was measured, and each model's number."""

    spec: Spec
    language: str
    label: str
    n: int
    records: list[Record | None]  # by model
    notes: list[str]  # by model

    @property
    def cells(self) -> list[Cell | None]:
        """Each model's number as text."""
        pairs = zip(self.records, self.notes, strict=True)
        return [cell(record, note) if record else None for record, note in pairs]


@dataclass
class Section:
    """A data set's rows by group."""

    name: str
    groups: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def main(self) -> list[Line]:
        """The most important rows."""
        return self.groups.get(MAIN, [])

    @property
    def details(self) -> dict[str, list[Line]]:
        """The other rows, by group."""
        return {name: lines for name, lines in self.groups.items() if name != MAIN}


def cell(record: Record, note: str = "") -> Cell:
    """Return a number as text, in the unit that its spec names."""
    (low, high), value, unit = record.ci95, record.value, record.spec.unit
    if unit == "points":
        interval = f"{percent(low):+.1f} to {percent(high):+.1f}"
        return Cell(f"{percent(value):+.1f}", interval, low > 0 or high < 0, note=note)
    if unit == "rank":
        return Cell(f"{value:,.0f}", f"{low:,.0f} to {high:,.0f}", note=note)
    if unit == "number":
        return Cell(f"{value:.3f}", f"{low:.3f} to {high:.3f}", note=note)
    return Cell(f"{percent(value):.1f}", f"{percent(low):.1f} to {percent(high):.1f}", share=value, note=note)


def percent(share: float) -> float:
    """Return a share in percent, to a tenth."""
    return round(100 * share, 1) or 0.0  # no -0.0


def sections(records: Sequence[Sequence[Record]], templates: Templates) -> list[Section]:
    """Return the rows of every data set, in the order of the records; `records` are by model."""
    by_name: dict[str, list[Record | None]] = {}
    for model, own in enumerate(records):
        for record in own:
            by_name.setdefault(record.name, [None] * len(records))[model] = record
    by_dataset: dict[str, Section] = {}
    for same in by_name.values():
        first = next(record for record in same if record)
        if first.group == forgetting.HEADING:  # these have a table of their own
            continue
        label = first.label(templates.get(first.dataset, {}).get(first.language, []))
        section = by_dataset.setdefault(first.dataset, Section(first.dataset))
        count = max(record.n for record in same if record)
        line = Line(first.spec, first.language, label, count, same, [""] * len(same))
        section.groups.setdefault(first.group, []).append(line)
    for section in by_dataset.values():
        worst = _worst([line for lines in section.details.values() for line in lines])
        section.groups[MAIN] = _ordered(section.main, worst)
    return list(by_dataset.values())


def _ordered(lines: Sequence[Line], worst: Sequence[Line]) -> list[Line]:
    """Sort main rows by language, then by spec; rows without a spec, and then the `worst` rows, are last."""
    order = {id(spec): number for number, spec in enumerate(SPECS)} | {id(line): len(SPECS) + 1 for line in worst}
    languages = list(dict.fromkeys(line.language for line in (*lines, *worst)))

    def place(line: Line) -> tuple[int, int]:
        return languages.index(line.language), order.get(id(line), order.get(id(line.spec), len(SPECS)))

    return sorted((*lines, *worst), key=place)


def _worst(lines: Sequence[Line]) -> list[Line]:
    """Return the rows of `Spec.worst`: each model's largest number, with the label of that number as a note."""
    by_label: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.spec.worst:
            by_label.setdefault((line.language, line.spec.worst), []).append(line)
    rows = []
    for (language, label), same in by_label.items():
        records: list[Record | None] = []
        notes: list[str] = []
        for model in range(len(same[0].records)):
            own = [(record, line.label) for line in same if (record := line.records[model])]
            largest = max(own, key=lambda pair: pair[0].value) if own else (None, "")
            records.append(largest[0])
            notes.append(largest[1])
        count = max(record.n for record in records if record)
        rows.append(Line(same[0].spec, language, label, count, records, notes))
    return rows


def console() -> Console:
    """Return a console for tables, as wide as the terminal."""
    return Console(width=None if Console().is_terminal else _WIDTH)


def print_tables(
    sections: Sequence[Section],
    labels: Sequence[str],
    warnings: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print the main rows of every data set with its notes, in tables of as many models as fit."""
    out = console()
    for warning in warnings:
        out.print(Text(f"Warning: {warning}", style="yellow"))
    width = _WIDE if len(labels) <= _MOST_WIDE else _NARROW
    fitting = max(1, (out.width - _LEFT) // width)
    size = math.ceil(len(labels) / math.ceil(len(labels) / fitting))  # tables of nearly the same size
    for section in sections:
        for start in range(0, len(labels), size):
            chosen = range(start, min(start + size, len(labels)))
            out.print(_table(section, [labels[place] for place in chosen], chosen, width))
        for note in (notes or {}).get(section.name, ()):
            out.print(Text(f"{section.name}: {note}", style="dim"))
    out.print(Text(NOTE, style="dim"))


def _table(section: Section, labels: Sequence[str], chosen: Sequence[int], width: int) -> Group:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("language", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for label in labels:
        table.add_column(Text(label), justify="right", max_width=width, overflow="fold")
    for language, lines in itertools.groupby(section.main, key=lambda line: line.language):
        for line in lines:
            cells = [_rich(line.cells[place], width) for place in chosen]
            table.add_row(Text(line.label), Text(language), f"{line.n:,}", *cells)
        table.add_section()
    return Group(Text(section.name, style="bold"), table)


def _rich(cell: Cell | None, width: int) -> Text:
    if cell is None:
        return Text("")
    if width == _WIDE and not cell.note:
        return Text.assemble((cell.value, "bold"), f" ({cell.interval})", " *" if cell.marked else "  ")
    mark = " *" if cell.marked else ""
    return Text.assemble((cell.value, "bold"), mark, f"\n{cell.interval}", f"\n{cell.note}" if cell.note else "")


def markdown(
    sections: Sequence[Section],
    labels: Sequence[str],
    warnings: Sequence[str],
    notes: Mapping[str, Sequence[str]],
) -> str:
    """Return a Markdown page: the main rows and the notes of every data set, then the other rows by group."""
    parts = ["# Results", NOTE, *(f"> **Warning:** {escaped(warning)}" for warning in warnings)]
    for section in sections:
        parts += [f"## {escaped(section.name)}", _rows(section.main, labels)]
        parts += [f"- {escaped(note)}" for note in notes.get(section.name, ())]
    for section in sections:
        for group, lines in section.details.items():
            parts += [f"### {escaped(section.name)}: {escaped(group)}", _rows(lines, labels)]
    return "\n\n".join(parts) + "\n"


def _rows(lines: Sequence[Line], labels: Sequence[str]) -> str:
    rows = [["", "language", "n", *labels], ["---", "---", "--:", *["--:"] * len(labels)]]
    for line in lines:
        cells = [str(cell) if cell else "" for cell in line.cells]
        rows.append([line.label, line.language, f"{line.n:,}", *cells])
    return markdown_table(rows)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the second line aligns the columns."""
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(text: str) -> str:
    """Return text in one line, without Markdown's effects."""
    return " ".join(re.sub(r"([\\`*|\[\]<])", r"\\\1", text).split())
