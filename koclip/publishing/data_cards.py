"""Data cards: what each data set is, where it comes from, and on which terms each part of it may be used.

A card is a Markdown file with a front matter in YAML; data_cards/README.md says what its keys hold.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from koclip.config import ConfigError
from koclip.publishing.licences import Part, read_parts

_LICENCES_FORM = (
    "expected `licenses`, a list of parts, each with part, id (an id of SPDX or the Hub, other or none), source, "
    "words, commercial, redistribution, share_alike: nothing follows from a sentence. data_cards/README.md shows it"
)
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")  # leads nowhere outside of the repository


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value)


def _maps_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(item) for pair in value.items() for item in pair)


def _counts(value: Any) -> bool:
    number = (int, str)
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_is_text(key) and isinstance(value[key], number) for key in value)
    )


# Of each key but `licenses`: whether a card needs it, how its value is checked, and what is expected.
_KEYS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "id": (False, _is_text, "the file's stem"),
    "source": (True, _is_text, "who made the data, and where they come from"),
    "languages": (True, lambda value: _are_texts(value) and bool(value), "a list of codes, as [ko, en]"),
    "rows": (True, _counts, "the number of rows by split"),
    "files": (False, _maps_texts, "the sha256 of every file by its path, {} if there are none"),
    "columns": (False, _maps_texts, "what each column holds"),
    "used_by": (False, _are_texts, "a list of configurations"),
    "hub": (False, _is_text, "the data set's id on the Hub"),
    "revision": (False, _is_text, "a commit on the Hub"),
    "unverified": (False, _maps_texts, "for every key that nobody could read at its source, where its value is from"),
}


@dataclass(frozen=True)
class DataCard:
    """What a data card says, as data_cards/README.md describes it. `files` and `hub` are empty where it has none."""

    source: str
    licenses: tuple[Part, ...]
    languages: list[str]
    rows: dict[str, int | str]
    files: dict[str, str]
    hub: str | None
    revision: str | None
    is_unverified: bool
    limits: str
    harms: str


def read(file: Path) -> DataCard:
    """Read a data card and check it.

    Raises:
        ConfigError: something is missing, unknown or of a wrong kind; the message names all of it.
    """
    values, prose = split(file)
    parts, faults = read_parts(values["licenses"]) if "licenses" in values else ([], [])
    paragraphs = {name: _paragraph(prose, name) for name in ("Limits", "Harms")}
    faults = [*_faults(values, file), *faults]
    faults += [f"**{name}.**: got no paragraph that begins so" for name, text in paragraphs.items() if not text]
    if faults:
        raise ConfigError("; ".join(f"{file}: {fault}" for fault in faults))
    return DataCard(
        source=values["source"],
        licenses=tuple(parts),
        languages=values["languages"],
        rows=values["rows"],
        files=values.get("files", {}),
        hub=values.get("hub"),
        revision=values.get("revision"),
        is_unverified=bool(values.get("unverified")),
        limits=paragraphs["Limits"],
        harms=paragraphs["Harms"],
    )


def split(file: Path) -> tuple[dict[str, Any], str]:
    """Return a card's front matter, {} if it has none, and its prose.

    Raises:
        ConfigError: it is not UTF-8; or the front matter is no YAML, or has a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        parts = re.match(r"---\n(.*?)^---\n(.*)", text, re.DOTALL | re.MULTILINE)
        values = yaml.load(parts[1], _Loader) if parts else {}  # a SafeLoader
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: its front matter cannot be read: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}, parts[2] if parts else text


def _faults(values: Mapping[str, Any], file: Path) -> Iterator[str]:
    """Yield what is wrong with a front matter but for its `licenses`."""
    if "license" in values:
        yield f"license: got {values['license']!r}, {_LICENCES_FORM}"
    elif "licenses" not in values:
        yield f"licenses: got None, {_LICENCES_FORM}"
    for key in sorted(set(map(str, values)) - {*_KEYS, "license", "licenses"}):
        yield f"{key}: no such key; expected {', '.join(_KEYS)}, licenses"
    for key, (needed, is_right, expected) in _KEYS.items():
        if (needed or key in values) and not is_right(values.get(key)):
            yield f"{key}: got {values.get(key)!r}, expected {expected}"
    if values.get("id", file.stem) != file.stem:
        yield f"id: got {values['id']!r}, expected {file.stem}, as the file is called"
    if "licenses" in (values.get("unverified") or {}):
        yield "unverified.licenses: expected no such key: a part whose terms are not verified is `id: other`"


def _paragraph(prose: str, name: str) -> str:
    """Return a paragraph that begins with its name in bold, on one line; "" if there is none."""
    found = re.search(rf"\*\*{name}\.\*\* (.+?)(?:\n\n|\Z)", prose, re.DOTALL)
    return " ".join(_LOCAL_LINK.sub(r"\1", found[1]).split()) if found else ""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
