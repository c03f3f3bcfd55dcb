"""The licence that a model's sources leave it: the strictest of its towers and its training data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

UNSTATED = "unstated"
_NO = re.compile(r"no licen[cs]e stated|states? no licen[cs]e|unstated|rights stay", re.IGNORECASE)
_RESEARCH = re.compile(
    r"non-?commercial|\bresearch\b|educational?\b|\bNC\b|by-nc|-nc-|internal use|evaluation only", re.IGNORECASE
)
_ALIKE = re.compile(r"\bcc-by-sa-\d+(?:\.\d+)?|\b[al]?gpl(?:-\d+(?:\.\d+)?)?|\bodbl\b", re.IGNORECASE)
_FREE = re.compile(
    r"\bapache-2\.0|\bmit\b|\bbsd\b|\bbsd-\d|\bcc0\b|\bcc0-|\bcc-by-\d|\bofl-1\.1|\bofl\b|\bunicode-3\.0|\bisc\b"
    r"|\bunlicense\b|\bpublic domain\b|\bcdla-permissive|\bzlib\b",
    re.IGNORECASE,
)


class Terms(IntEnum):
    """What a licence asks of those who pass a model on, from the least to the most."""

    FREE = 0
    ALIKE = 1
    OWN = 2
    NONE_STATED = 3
    RESEARCH = 4


_NAMES = {
    Terms.OWN: ("terms-of-sources", "some of its sources have terms of their own, which hold for it too"),
    Terms.NONE_STATED: ("unstated-sources", "some of its sources state no licence, so nobody can grant you one"),
    Terms.RESEARCH: ("non-commercial-research", "some of its sources may be used for non-commercial research only"),
}


@dataclass(frozen=True)
class Source:
    """One link of the chain: a tower or a data set, and its licence in the words of its card."""

    role: str
    name: str
    licence: str

    @property
    def terms(self) -> Terms:
        """The strictest thing that its licence says."""
        return terms_of(self.licence)


@dataclass(frozen=True)
class Licence:
    """What the model's metadata say, and one sentence on why. `name` is given where `id` is `other`."""

    id: str
    name: str | None
    why: str


def terms_of(text: str) -> Terms:
    """Return the strictest terms that a licence in words, or as an identifier, holds."""
    for pattern, terms in ((_RESEARCH, Terms.RESEARCH), (_NO, Terms.NONE_STATED), (_ALIKE, Terms.ALIKE)):
        if pattern.search(text):
            return terms
    return Terms.FREE if _FREE.search(text) else Terms.OWN


def conclude(sources: Sequence[Source], wish: str) -> Licence:
    """Return the licence of a model made of `sources`.

    Args:
        sources: Its towers and its training data.
        wish: The licence that its makers give it where the sources leave the choice.
    """
    strictest = max((one.terms for one in sources), default=Terms.FREE)
    if strictest == Terms.FREE:
        return Licence(wish, None, "its sources leave its makers the choice")
    bound = [one for one in sources if one.terms == strictest]
    if strictest == Terms.ALIKE:
        wanted = {found.lower() for one in bound for found in _ALIKE.findall(one.licence)}
        if len(wanted) == 1:
            return Licence(wanted.pop(), None, f"{_names(bound)} must be passed on under that licence")
        return Licence("other", "share-alike-sources", f"{_names(bound)} must be passed on under their own licences")
    name, why = _NAMES[strictest]
    return Licence("other", name, f"{why}: {_names(bound)}")


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(dict.fromkeys(one.name for one in sources))
