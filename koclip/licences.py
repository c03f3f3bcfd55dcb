"""Read data cards with their licences, and conclude the licence of a model or a data set from those of its sources.

A data card describes a data set, its source and the terms of each part. It is a Markdown file with YAML front matter;
data_cards/README.md describes the keys. A model's licence is the strictest of its towers and its training data; that of
a curated data set is the strictest of its sources. Only fields decide: a licence's id in `assets/licences.tsv`, and the
fields of a data card. No sentence is interpreted.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from koclip.config import ConfigError, check
from koclip.storage import read_table

OTHER, NONE, UNSTATED = "other", "none", "unstated"
NOT_STATED = "no licence stated"  # how `Part.licence` begins with the id `none`
# Uses that a licence allows or not: the key in a data card, and the words in a table.
ALLOWS = {"commercial": "commercial use", "redistribution": "passing on", "share_alike": "share-alike"}
_PART_KEYS = {"part", "id", "source", "words", *ALLOWS}
# By the terms in assets/licences.tsv: commercial, redistribution, share_alike.
_TERMS: dict[str, tuple[bool | None, bool | None, bool | None]] = {
    "free": (True, True, False),
    "alike": (True, True, True),
    "nc": (False, True, False),
    "nc-alike": (False, True, True),
    "own": (None, None, None),
}
_NON_COMMERCIAL = ("non-commercial-sources", "some of its sources may not be used commercially")
_NONE_STATED = ("unstated-sources", "some of its sources state no licence, so nobody can grant you one")
_OWN = ("terms-of-sources", "some of its sources have special terms, which apply to it too")
_LICENCES_FORM = (
    "expected `licenses`, a list of parts, each with part, id (an id of SPDX or the Hub, other or none), source, "
    "words, commercial, redistribution, share_alike: sentences are not interpreted. data_cards/README.md has examples"
)
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")  # broken outside of the repository


@dataclass(frozen=True)
class Part:
    """The terms of one part of a source, such as captions, photos or weights. None: not stated.

    Args:
        part: Name of the part.
        id: The licence's id, in lower case; `other` if it has no id, `none` if no licence is stated.
        source: Where the licence is stated.
        words: Quoted terms, if the id does not say them.
        commercial: Whether commercial use is allowed.
        redistribution: Whether it may be passed on.
        share_alike: Whether derived works must be passed on under the same licence.
    """

    part: str
    id: str
    source: str
    words: str = ""
    commercial: bool | None = None
    redistribution: bool | None = None
    share_alike: bool | None = None

    @property
    def is_known(self) -> bool:
        """Whether the licence's id states all terms."""
        return _known().get(self.id, _TERMS["own"]) != _TERMS["own"]

    @property
    def licence(self) -> str:
        """The id, with the quoted terms if the id does not say them."""
        name = NOT_STATED if self.id == NONE else self.id
        return f"{name} (“{self.words}”)" if self.words else name

    @property
    def answers(self) -> list[str]:
        """Whether each use of `ALLOWS` is permitted: yes, no or not stated."""
        return [{True: "yes", False: "no", None: "not stated"}[getattr(self, key)] for key in ALLOWS]


@dataclass(frozen=True)
class Source:
    """A tower or a data set that a licence depends on, with the terms of its parts."""

    role: str
    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Licence:
    """The licence in the metadata of a model or a data set, with the reason; `name` is set if `id` is `other`."""

    id: str
    name: str | None
    why: str


def read_parts(values: Any) -> tuple[list[Part], list[str]]:
    """Read the `licenses` of a data card; return its parts, and its faults."""
    if not isinstance(values, list) or not values:
        return [], [f"licenses: got {values!r}, expected a list of one or more parts"]
    faults = [f"licenses[{place}]{fault}" for place, part in enumerate(values) for fault in _part_faults(part)]
    if faults:
        return [], faults
    parts = [_part(part) for part in values]
    names = [part.part for part in parts]
    return parts, [] if len(set(names)) == len(names) else [f"licenses: got the parts {names}, expected each once"]


def _part_faults(values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f": got {values!r}, expected a mapping with part, id and source"
        return
    for key in sorted(set(map(str, values)) - _PART_KEYS):
        yield f".{key}: unknown key; expected {', '.join(sorted(_PART_KEYS))}"
    for key in ("part", "id", "source"):
        if not _is_text(values.get(key)):
            yield f".{key}: got {values.get(key)!r}, expected a text"
    if "words" in values and not _is_text(values["words"]):
        yield f".words: got {values['words']!r}, expected a quotation of the terms"
    for key in ALLOWS:
        value = values.get(key, UNSTATED)
        if not isinstance(value, bool) and value != UNSTATED:
            yield f".{key}: got {value!r}, expected true, false or {UNSTATED}"
    if _is_text(values.get("id")):
        yield from _contradictions(values, _id(values["id"]))


def _contradictions(values: Mapping[str, Any], id_: str) -> Iterator[str]:
    """Yield the fields of a part that contradict its licence's id."""
    own = f"a part with special terms has `id: {OTHER}` and quotes them in `words`"
    if id_ not in (*_known(), OTHER, NONE):
        near = difflib.get_close_matches(id_, _known(), 3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        expected = f"expected the id of a licence at SPDX or the Hub{meant}, {OTHER} or {NONE}"
        yield f".id: got {values['id']!r}, {expected}; {own}"
        return
    terms = _known().get(id_, _TERMS["own"])
    if terms == _TERMS["own"]:
        if id_ == OTHER and "words" not in values:
            yield f".words: got None, expected a quotation of the terms, because the id is {OTHER}"
        for key in ("commercial", "redistribution"):
            if id_ == NONE and values.get(key) is True:
                yield f".{key}: got True, expected false or {UNSTATED}, because the id is {NONE}: no licence is stated"
        return
    if "words" in values:
        yield f".words: got {values['words']!r}, expected no words with the id {id_}, which says all terms; {own}"
    for key, allowed in zip(ALLOWS, terms, strict=True):
        if key in values and values[key] is not allowed:
            yield f".{key}: got {values[key]!r}, expected {str(allowed).lower()} with the id {id_}; {own}"


def _part(values: Mapping[str, Any]) -> Part:
    id_ = _id(values["id"])
    part, source, words = (" ".join(values.get(key, "").split()) for key in ("part", "source", "words"))
    known = zip(ALLOWS, _known().get(id_, _TERMS["own"]), strict=True)
    answers = (values.get(key, answer) for key, answer in known)
    return Part(part, id_, source, words, *(None if answer == UNSTATED else answer for answer in answers))


def stated_parts(
    stated: str | Sequence[str] | None, source: str, words: str = "", part: str = "weights"
) -> tuple[Part, ...]:
    """Return the terms of a part, by default of a model's weights.

    `stated` is an id, several ids that all apply, words, or None; `source` states it. `words` are the terms of `other`.
    """
    several = [stated] if isinstance(stated, str) else list(stated or [UNSTATED])
    parts = []
    for licence in several:
        id_ = NONE if _id(licence) in ("", UNSTATED) else _id(licence)
        own = {} if id_ in (*_known(), NONE) else {"words": words if words and id_ == OTHER else licence}
        parts.append(_part({"part": part, "source": source, "id": OTHER if own else id_, **own}))
    return tuple(parts)


def conclude(sources: Sequence[Source], wish: str, key: str = "license") -> Licence:
    """Return the licence of a model or a data set with these sources; `wish`, set by `key`, if they leave the choice.

    Raises:
        ConfigError: `wish` is not an id of the Hub.
    """
    check(wish in _hub(), key, wish, "expected an id of huggingface.co/docs/hub/repositories-licenses")
    rules = (
        (_NON_COMMERCIAL, lambda part: part.commercial is False),
        (_NONE_STATED, lambda part: part.id == NONE),
        (_OWN, lambda part: not part.is_known),
    )
    for (name, why), binds in rules:
        bound = [source.name for source in sources if any(binds(part) for part in source.parts)]
        if bound:
            return Licence(OTHER, name, f"{why}: {_names(bound)}")
    alike = [(source.name, part.id) for source in sources for part in source.parts if part.share_alike]
    if not alike:
        return Licence(wish, None, "its sources leave its makers the choice")
    bound, wanted = [name for name, _ in alike], {id_ for _, id_ in alike}
    if len(wanted) > 1:
        return Licence(OTHER, "share-alike-sources", f"{_names(bound)} must be passed on under their own licences")
    (id_,) = wanted
    if id_ in _hub():
        return Licence(id_, None, f"{_names(bound)} must be passed on under that licence")
    return Licence(OTHER, id_, f"{_names(bound)} must be passed on under {id_}")


def chain_rows(sources: Sequence[Source]) -> Iterator[list[str]]:
    """Yield for every part its source, role, name and licence, the answers to `ALLOWS`, and who states them."""
    for source in sources:
        for part in source.parts:
            yield [source.name, source.role, part.part, part.licence, *part.answers, part.source]


def terms(rows: Iterable[Sequence[str]]) -> str:
    """Return the rows of `chain_rows` as a list in Markdown."""
    lines = []
    for name, role, part, licence, *answers, stated in rows:
        allowed = ", ".join(f"{what}: {answer}" for what, answer in zip(ALLOWS.values(), answers, strict=True))
        lines.append(f"- {name} ({role}), {part}: {licence}. {allowed}. Stated: {stated}")
    return "\n".join(lines)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value)


def _maps_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(item) for pair in value.items() for item in pair)


def _counts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_is_text(k) and isinstance(v, int | str) for k, v in value.items())
    )


# By key, without `licenses`: whether a card needs it, the check of its value, and what is expected.
_CARD_KEYS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "id": (False, _is_text, "the file's stem"),
    "source": (True, _is_text, "the authors and the origin of the data"),
    "languages": (True, lambda value: _are_texts(value) and bool(value), "a list of codes, as [ko, en]"),
    "rows": (True, _counts, "the number of rows by split"),
    "files": (False, _maps_texts, "the sha256 of every file by its path, {} without files"),
    "columns": (False, _maps_texts, "the content of each column"),
    "used_by": (False, _are_texts, "a list of configurations"),
    "hub": (False, _is_text, "the data set's id on the Hub"),
    "revision": (False, _is_text, "a commit on the Hub"),
    "unverified": (False, _maps_texts, "for every key that was not checked at its source, the origin of its value"),
}


@dataclass(frozen=True)
class DataCard:
    """The content of a data card; data_cards/README.md describes the keys. `files` may be empty, `hub` None."""

    source: str
    licenses: tuple[Part, ...]
    languages: list[str]
    rows: dict[str, int | str]
    files: dict[str, str]
    hub: str | None
    revision: str | None
    limits: str
    harms: str


def read_data_card(file: Path) -> DataCard:
    """Read a data card and check it.

    Raises:
        ConfigError: a value is missing, unknown or of a wrong type; the message lists all faults.
    """
    values, prose = front_matter(file)
    parts, part_faults = read_parts(values["licenses"]) if "licenses" in values else ([], [])
    paragraphs = {name: _paragraph(prose, name) for name in ("Limits", "Harms")}
    faults = [*_card_faults(values, file), *part_faults]
    faults += [f"**{name}.**: expected a paragraph that begins so" for name, text in paragraphs.items() if not text]
    if faults:
        raise ConfigError("; ".join(f"{file}: {fault}" for fault in faults))
    return DataCard(
        source=" ".join(values["source"].split()),
        licenses=tuple(parts),
        languages=values["languages"],
        rows=values["rows"],
        files=values.get("files", {}),
        hub=values.get("hub"),
        revision=values.get("revision"),
        limits=paragraphs["Limits"],
        harms=paragraphs["Harms"],
    )


def find_data_card(name: str, path: str | None, cards: Sequence[Path]) -> Path | None:
    """Return the data card of that name; else the card that lists the file; else, of a file in data/<name>, that card.

    Earlier directories of `cards` go first. `koclip data` builds data/<name>. A user's folder that only has the name of
    a data set is not that data set: its licences would be wrong.
    """
    named = [directory / f"{name}.md" for directory in cards]
    others = (card for directory in cards for card in sorted(directory.glob("*.md")) if path is not None)
    listing = (card for card in others if path in (front_matter(card)[0].get("files") or {}))
    folder = Path(path or "").parent
    built = [directory / f"{folder.name}.md" for directory in cards if folder.parent.name == "data"]
    return next(itertools.chain(filter(Path.is_file, named), listing, filter(Path.is_file, built)), None)


def front_matter(file: Path) -> tuple[dict[str, Any], str]:
    """Return the YAML front matter of a card ({} without one) and its text.

    `huggingface_hub.DatasetCard` would hide faults: it takes the last of two equal keys and drops null values.

    Raises:
        ConfigError: the file is not UTF-8, or the front matter is not YAML or has a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        block = REGEX_YAML_BLOCK.search(text)  # the Hub's own
        values = yaml.load(block[2], _Loader) if block else {}  # a SafeLoader
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: its front matter cannot be read: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}, text[block.end() :] if block else text


def _card_faults(values: Mapping[str, Any], file: Path) -> Iterator[str]:
    """Yield the faults of a front matter, without those of `licenses`."""
    if "license" in values:
        yield f"license: got {values['license']!r}, {_LICENCES_FORM}"
    elif "licenses" not in values:
        yield f"licenses: got None, {_LICENCES_FORM}"
    for key in sorted(set(map(str, values)) - {*_CARD_KEYS, "license", "licenses"}):
        yield f"{key}: unknown key; expected {', '.join(_CARD_KEYS)}, licenses"
    for key, (needed, is_right, expected) in _CARD_KEYS.items():
        if (needed or key in values) and not is_right(values.get(key)):
            yield f"{key}: got {values.get(key)!r}, expected {expected}"
    if values.get("id", file.stem) != file.stem:
        yield f"id: got {values['id']!r}, expected {file.stem}, the name of the file"
    if "licenses" in (values.get("unverified") or {}):
        yield "unverified.licenses: expected no such key: a part whose terms are not verified has `id: other`"


def _paragraph(prose: str, name: str) -> str:
    """Return the paragraph that begins with `name` in bold, as one line; "" if there is none."""
    match = re.search(rf"\*\*{name}\.\*\* (.+?)(?:\n\n|\Z)", prose, re.DOTALL)
    return " ".join(_LOCAL_LINK.sub(r"\1", match[1]).split()) if match else ""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is twice in a mapping; YAML uses the last value silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _id(text: str) -> str:
    """Return a text spelt as an id: SPDX ignores case, and people write CC BY 4.0 for CC-BY-4.0."""
    return "-".join(text.lower().split())


@cache
def _known() -> dict[str, tuple[bool | None, bool | None, bool | None]]:
    return {id_: _TERMS[terms] for id_, terms, _ in read_table("licences.tsv")}


@cache
def _hub() -> frozenset[str]:
    return frozenset(id_ for id_, _, hub in read_table("licences.tsv") if hub == "hub")
