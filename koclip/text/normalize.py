"""Clean captions: one Unicode form, single spaces, no invisible characters, no special-token strings."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Strings that tokenizers of the CLIP, BERT, RoBERTa and T5 families turn into control tokens, in any letter case
# (CLIP's tokenizer lowercases). In a caption they would end the text early or shift its positions.
_SPECIAL = re.compile(
    r"<\|\w{1,40}\|>|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]|</?(?:s|bos|eos|pad|unk|mask)>",
    re.IGNORECASE,
)
# Soft hyphen, zero-width space, direction marks, word joiner, byte-order mark. The zero-width joiners stay: emoji
# and some scripts are spelt with them.
_INVISIBLE = frozenset("\u00ad\u061c\u180e\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff") | frozenset(
    chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x2070))
)
_HANGUL_FILLERS = str.maketrans(dict.fromkeys("\u3164\uffa0", " "))  # letters by category, blanks on the screen
# Nothing to be seen: joiners, variation selectors and the fillers of incomplete syllables, without a letter.
_BARE = re.compile(r"[\s\u115f\u1160\u200c\u200d\ufe00-\ufe0f]*")
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
    """Return the captions in a table cell, each in its place: a string, a list of strings, or anything else (none).

    "" stands in the place of what is no usable caption: empty strings, missing values, their spelt-out forms such as
    "nan", and values that are not text. A cell without any usable caption has no places.
    """
    values: Iterable[object] = cell if isinstance(cell, (list, tuple)) else [cell]
    captions = [_caption(value) for value in values]
    return captions if any(captions) else []


def usable(captions: Iterable[str]) -> list[str]:
    """Return captions without the empty places between them."""
    return [caption for caption in captions if caption]


def paired(first: Sequence[object], second: Sequence[object]) -> list[int] | None:
    """Return the places where the captions of a row in two languages correspond: those where neither is empty.

    Languages with unequal numbers of places do not correspond: None.
    """
    if len(first) != len(second):
        return None
    return [place for place, captions in enumerate(zip(first, second, strict=True)) if all(captions)]


def _caption(value: object) -> str:
    """Return a value as a caption, "" if it is none."""
    caption = normalize(value) if isinstance(value, str) else ""
    return "" if caption.lower() in _MISSING else caption


def _is_text(character: str) -> bool:
    """Tell white space and visible characters from control characters, lone surrogates and invisible ones."""
    if character.isspace():
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in _INVISIBLE
