"""Find files and folders by name, in any Unicode form: macOS writes Korean names decomposed, most others composed."""

import os
import unicodedata
from collections import defaultdict
from functools import lru_cache
from pathlib import Path


def locate(path: str | Path) -> Path:
    """Return the path of what is there under this name, in any Unicode form; the path itself where there is nothing.

    Of several forms of one name the one that is written comes first, then NFC, then NFD.
    """
    path = Path(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    place = Path(path.anchor)
    for name in path.parts[1:] if path.anchor else path.parts:
        spelling = _spelling(place, name)
        if spelling is None:
            return path
        place /= spelling
    return place


def _spelling(folder: Path, name: str) -> str | None:
    """Return how a folder writes a name, None if it has no such entry or several, none of them in a common form."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if os.path.lexists(folder / form):
            return form
    if name.isascii():
        return None
    try:
        spellings = _listing(str(folder), folder.stat().st_mtime_ns)[unicodedata.normalize("NFC", name)]
    except (OSError, KeyError, ValueError):
        return None
    return spellings[0] if len(spellings) == 1 else None


@lru_cache(maxsize=64)
def _listing(folder: str, changed: int) -> dict[str, list[str]]:
    """Return the entries of a folder by their name in NFC; `changed` is the time of its last change."""
    entries = defaultdict(list)
    for entry in Path(folder).iterdir():
        entries[unicodedata.normalize("NFC", entry.name)].append(entry.name)
    return dict(entries)
