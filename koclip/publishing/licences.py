"""The licence that a model's sources leave it: the strictest of its towers and its training data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

UNSTATED = "unstated"
_CLAUSE = re.compile(r"\.(?=\s|$)|;")  # the dot of a version, as in 4.0, ends none
_NO = re.compile(r"\b(?:no|without a) licen[cs]e\b|unstated|rights stay|rights reserved", re.IGNORECASE)
_OWN = re.compile(r"\bterms of (?:use|access|service)\b|\bnot\b|\bexcept", re.IGNORECASE)
_RESEARCH = re.compile(
    r"non-?commercial|\bresearch\b|educational?\b|\bNC\b|by-nc|-nc-|internal use|evaluation only", re.IGNORECASE
)
_ALIKE = re.compile(r"\bcc-by-sa-\d+(?:\.\d+)?|\b[al]?gpl(?:-\d+(?:\.\d+)?)?|\bodbl\b", re.IGNORECASE)
_FREE = re.compile(
    r"\bapache-2\.0|\bmit\b|\bbsd\b|\bbsd-\d|\bcc0\b|\bcc0-|\bcc-by-\d|\bofl-1\.1|\bofl\b|\bunicode-3\.0|\bisc\b"
    r"|\bunlicense\b|\bpublic domain\b|\bcdla-permissive|\bzlib\b",
    re.IGNORECASE,
)
# Of those that `_ALIKE` finds, what the Hub takes: huggingface.co/docs/hub/repositories-licenses.
_HUB = {"cc-by-sa-3.0", "cc-by-sa-4.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "odbl"}


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
    """Return the strictest terms that a licence in words, or as an identifier, holds; a clause without one is OWN."""
    clauses = [one for one in _CLAUSE.split(text) if one.strip()]
    return max((_terms_of_clause(one) for one in clauses), default=Terms.NONE_STATED)


def _terms_of_clause(text: str) -> Terms:
    strictest_first = (
        *((_RESEARCH, Terms.RESEARCH), (_NO, Terms.NONE_STATED), (_OWN, Terms.OWN)),
        *((_ALIKE, Terms.ALIKE), (_FREE, Terms.FREE)),
    )
    return next((terms for pattern, terms in strictest_first if pattern.search(text)), Terms.OWN)


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
        wanted = {name.lower() for one in bound for name in _ALIKE.findall(one.licence)}
        if len(wanted) == 1:
            (found,) = wanted
            why = f"{_names(bound)} must be passed on under {'that licence' if found in _HUB else found}"
            return Licence(found, None, why) if found in _HUB else Licence("other", found, why)
        return Licence("other", "share-alike-sources", f"{_names(bound)} must be passed on under their own licences")
    name, why = _NAMES[strictest]
    return Licence("other", name, f"{why}: {_names(bound)}")


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(dict.fromkeys(one.name for one in sources))
