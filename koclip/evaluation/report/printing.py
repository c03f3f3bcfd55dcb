"""Rows as Markdown and in the terminal."""

import itertools
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from koclip.evaluation.report.table import Cell, Line, Section

NOTE = (
    "Percent with 95 % intervals. Differences are in percentage points, with a sign; * where the interval excludes 0. "
    "n: queries."
)
_WIDTH = 110  # columns where there is no terminal
_LEFT = 52  # columns of what stands left of the numbers
_WIDE, _NARROW = 28, 16  # columns of a model's numbers in one line and in two
_MOST_WIDE = 2  # models


def console() -> Console:
    """Return a console for tables: as wide as the terminal, or `_WIDTH` columns without a terminal."""
    return Console(width=None if Console().is_terminal else _WIDTH)


def print_tables(
    sections: Sequence[Section],
    labels: Sequence[str],
    warnings: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print the main rows of every data set, with as many models side by side as fit, and notes by data set."""
    out = console()
    for warning in warnings:
        out.print(Text(f"Warning: {warning}", style="yellow"))
    width = _WIDE if len(labels) <= _MOST_WIDE else _NARROW
    fitting = max(1, (out.width - _LEFT) // width)
    blocks = math.ceil(len(labels) / fitting)
    size = math.ceil(len(labels) / blocks)  # blocks of nearly the same size
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
    """Return a Markdown page: every data set's main rows with its notes, then all others by group."""
    parts = ["# Results", NOTE, *(f"> **Warning:** {_escaped(warning)}" for warning in warnings)]
    for section in sections:
        parts += [f"## {_escaped(section.name)}", _rows(section.main, labels)]
        parts += [f"- {_escaped(note)}" for note in notes.get(section.name, ())]
    for section in sections:
        for group, lines in section.details.items():
            parts += [f"### {_escaped(section.name)}: {_escaped(group)}", _rows(lines, labels)]
    return "\n\n".join(parts) + "\n"


def _rows(lines: Sequence[Line], labels: Sequence[str]) -> str:
    rows = [["", "language", "n", *labels], ["---", "---", "--:", *["--:"] * len(labels)]]
    for line in lines:
        cells = [str(cell) if cell else "" for cell in line.cells]
        rows.append([line.label, line.language, f"{line.n:,}", *cells])
    head, rule, *body = rows
    escaped = [[_escaped(value) for value in row] for row in (head, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:]))


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    plain = "".join(f"\\{letter}" if letter in "\\`*|[]<" else letter for letter in text)
    return " ".join(plain.split())
