"""The licence that a model's sources leave it: the strictest of its towers and its training data.

It follows from fields alone: a licence's id in `assets/licences.tsv`, and what a data card states. No sentence is read.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from koclip.config import check
from koclip.text import read_table

OTHER, NONE, UNSTATED = "other", "none", "unstated"
# Of what a part may be used for: the key of a data card, and its words in a table.
ALLOWS = {"commercial": "commercial use", "redistribution": "passing on", "share_alike": "share-alike"}
_KEYS = {"part", "id", "source", "words", *ALLOWS}
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
_OWN = ("terms-of-sources", "some of its sources have terms of their own, which hold for it too")


@dataclass(frozen=True)
class Part:
    """The terms of one part of a source, as captions, photos or weights. Of the three answers None means: not stated.

    Args:
        part: What it is.
        id: The licence's id, in lower case; `other` if it has none, `none` if no licence is stated.
        source: Where this is said.
        words: The terms as they are written, where an id does not say them.
        commercial: Whether commercial use is allowed.
        redistribution: Whether it may be passed on.
        share_alike: Whether what is made of it must be passed on under the same licence.
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
        """Whether the licence's id says all."""
        return _known().get(self.id, _TERMS["own"]) != _TERMS["own"]

    @property
    def licence(self) -> str:
        """The id, and the words where it does not say all."""
        name = "no licence stated" if self.id == NONE else self.id
        return f"{name} (“{self.words}”)" if self.words else name

    @property
    def answers(self) -> list[str]:
        """What it may be used for, in the order of `ALLOWS`: yes, no, not stated."""
        return [{True: "yes", False: "no", None: "not stated"}[getattr(self, key)] for key in ALLOWS]


@dataclass(frozen=True)
class Source:
    """One link of the chain: a tower or a data set, and the terms of its parts."""

    role: str
    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Licence:
    """What the model's metadata say, and one sentence on why. `name` is given where `id` is `other`."""

    id: str
    name: str | None
    why: str


def read_parts(values: Any) -> tuple[list[Part], list[str]]:
    """Read the `licenses` of a data card; return its parts, and what is wrong with them, nothing if all is well."""
    if not isinstance(values, list) or not values:
        return [], [f"licenses: got {values!r}, expected a list of parts, one or more"]
    faults = [f"licenses[{place}]{fault}" for place, part in enumerate(values) for fault in _faults(part)]
    if faults:
        return [], faults
    parts = [_part(part) for part in values]
    names = [part.part for part in parts]
    return parts, [] if len(set(names)) == len(names) else [f"licenses: got the parts {names}, expected each once"]


def _faults(values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f": got {values!r}, expected a mapping with part, id, source and what else is stated"
        return
    for key in sorted(set(map(str, values)) - _KEYS):
        yield f".{key}: no such key; expected {', '.join(sorted(_KEYS))}"
    for key in ("part", "id", "source"):
        if not _is_text(values.get(key)):
            yield f".{key}: got {values.get(key)!r}, expected some words"
    if "words" in values and not _is_text(values["words"]):
        yield f".words: got {values['words']!r}, expected the terms as they are written"
    for key in ALLOWS:
        value = values.get(key, UNSTATED)
        if not isinstance(value, bool) and value != UNSTATED:
            yield f".{key}: got {value!r}, expected true, false or {UNSTATED}"
    if _is_text(values.get("id")):
        yield from _contradictions(values, _id(values["id"]))


def _contradictions(values: Mapping[str, Any], id_: str) -> Iterator[str]:
    """Yield what a part says against its licence's id."""
    own = f"a part with terms of its own is `id: {OTHER}` with its `words`"
    if id_ not in (*_known(), OTHER, NONE):
        near = difflib.get_close_matches(id_, _known(), 3)
        meant = f" (is it {' or '.join(near)}?)" if near else ""
        expected = f"expected the id of a licence at SPDX or the Hub{meant}, {OTHER} or {NONE}"
        yield f".id: got {values['id']!r}, {expected}; {own}"
        return
    terms = _known().get(id_, _TERMS["own"])
    if terms == _TERMS["own"]:
        if id_ == OTHER and "words" not in values:
            yield f".words: got None, expected the terms as they are written, because the id is {OTHER}"
        for key in ("commercial", "redistribution"):
            if id_ == NONE and values.get(key) is True:
                yield f".{key}: got True, expected false or {UNSTATED}: the id says that no licence is stated"
        return
    if "words" in values:
        yield f".words: got {values['words']!r}, expected none beside the id {id_}, which says all; {own}"
    for key, allowed in zip(ALLOWS, terms, strict=True):
        if key in values and values[key] is not allowed:
            yield f".{key}: got {values[key]!r}, expected {str(allowed).lower()}, as {id_} says; {own}"


def _part(values: Mapping[str, Any]) -> Part:
    id_ = _id(values["id"])
    part, source, words = (" ".join(values.get(key, "").split()) for key in ("part", "source", "words"))
    known = zip(ALLOWS, _known().get(id_, _TERMS["own"]), strict=True)
    answers = (values.get(key, answer) for key, answer in known)
    return Part(part, id_, source, words, *(None if answer == UNSTATED else answer for answer in answers))


def model_parts(stated: str | Sequence[str] | None, source: str, words: str = "") -> tuple[Part, ...]:
    """Return the terms of a model's weights.

    Args:
        stated: What is said of its licence: an id, or several, all of which hold; words; or nothing.
        source: Who says it.
        words: What is said of a licence that is called `other`.
    """
    several = [stated] if isinstance(stated, str) else list(stated or [UNSTATED])
    parts = []
    for licence in several:
        id_ = NONE if _id(licence) in ("", UNSTATED) else _id(licence)
        own = {} if id_ in (*_known(), NONE) else {"words": words if words and id_ == OTHER else licence}
        parts.append(_part({"part": "weights", "source": source, "id": OTHER if own else id_, **own}))
    return tuple(parts)


def conclude(sources: Sequence[Source], wish: str) -> Licence:
    """Return the licence of a model made of `sources`.

    Args:
        sources: Its towers and its training data.
        wish: The licence that its makers give it where the sources leave the choice.

    Raises:
        ConfigError: `wish` is no id that the Hub knows.
    """
    check(wish in _hub(), "license", wish, "expected an id of huggingface.co/docs/hub/repositories-licenses")
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


def _names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _id(text: str) -> str:
    """Return a text as an id is spelt: SPDX's are the same in any case, and people write CC BY 4.0 for CC-BY-4.0."""
    return "-".join(text.lower().split())


@cache
def _known() -> dict[str, tuple[bool | None, bool | None, bool | None]]:
    return {id_: _TERMS[terms] for id_, terms, _ in read_table("licences.tsv")}


@cache
def _hub() -> frozenset[str]:
    return frozenset(id_ for id_, _, hub in read_table("licences.tsv") if hub == "hub")
