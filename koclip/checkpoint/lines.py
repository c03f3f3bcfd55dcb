"""Logs of one JSON object per line, and files replaced in one go: a process may die while it writes any of them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def append(file: Path, items: Iterable[dict[str, Any]]) -> None:
    """Append a line per item."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the items of a log; a last line that was cut off is no item. A missing log is empty."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")  # str.splitlines would also split at U+2028 in a key
    return [json.loads(line) for line in lines]


def keep(file: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the wanted items in a log."""
    if file.exists():
        replace(file, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in read(file) if wanted(item)))


def replace(file: Path, text: str) -> None:
    """Give a file another content; whoever reads it sees the old one or the new one."""
    partial = file.with_name(f"writing-{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
