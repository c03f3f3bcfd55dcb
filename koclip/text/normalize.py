"""Clean captions: one Unicode form, single spaces, no invisible characters, no special-token strings."""

import re
import unicodedata
from collections.abc import Iterable

from koclip.text.characters import BARE, FILLERS, INVISIBLE, SPECIAL

_SPECIAL = re.compile(SPECIAL)
_INVISIBLE = frozenset(INVISIBLE)
_HANGUL_FILLERS = str.maketrans(dict.fromkeys(FILLERS, " "))
_BARE = re.compile(rf"[\s{BARE}]*")
_LONGEST = 10_000  # characters; Python's NFC takes time quadratic in a run of combining marks
_MISSING = frozenset({"nan", "none", "null", "<na>"})  # what pandas, Python and JSON write for "no value"


def normalize(text: str) -> str:
    """Return `text` (its first 10,000 characters) in NFC, single-spaced, without control characters and special tokens.

    Korean comes decomposed (NFD) from macOS file names and some corpora; many fast tokenizers do not compose it.
    """
    text = text.translate(_HANGUL_FILLERS)
    if not text.isprintable():
        text = "".join(character for character in text if _is_text(character))
    text = unicodedata.normalize("NFC", text[:_LONGEST])
    text = _SPECIAL.sub(" ", text)  # last: what was removed above may have hidden one
    return "" if _BARE.fullmatch(text) else " ".join(text.split())


def clean_captions(cell: object) -> list[str]:
    """Return the usable captions in a table cell: a string, a list of strings, or anything else (no caption).

    Empty strings, missing values, their spelt-out forms such as "nan", and values that are not text are left out.
    """
    values: Iterable[object] = cell if isinstance(cell, (list, tuple)) else [cell]
    cleaned = (normalize(value) for value in values if isinstance(value, str))
    return [caption for caption in cleaned if caption and caption.lower() not in _MISSING]


def _is_text(character: str) -> bool:
    """Tell white space and visible characters from lone surrogates and invisible ones."""
    return character not in _INVISIBLE and unicodedata.category(character) != "Cs"
