"""Clean captions: NFC, single spaces, no HTML entities, no invisible characters, no strings of special tokens.

`normalize` uses the public patterns in Python, and `koclip.text.tokenizers` writes them into the files of tokenizers.
They have the same meaning in Python, in `tokenizers` (Oniguruma) and in transformers.js: no flags, no classes such as
\\w.
"""

import ast
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

_BASIC = [chr(code) for code in range(0x10000)]  # includes all spaces and control characters
SPACES = "".join(filter(str.isspace, _BASIC))
FILLERS = "\u3164\uffa0"  # Hangul fillers: letters by Unicode category, blank on the screen
# Soft hyphen, zero-width space, direction marks, word joiner, byte-order mark. The zero-width joiners stay: emoji and
# some scripts need them.
_MARKS = "\u00ad\u061c\u180e\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff" + "".join(
    chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x2070))
)
_CONTROLS = "".join(letter for letter in _BASIC if unicodedata.category(letter) == "Cc" and not letter.isspace())
INVISIBLE = _MARKS + _CONTROLS
# Invisible in a text without letters: joiners, variation selectors and the fillers of incomplete syllables.
BARE = "\u115f\u1160\u200c\u200d" + "".join(chr(code) for code in range(0xFE00, 0xFE10))


def _any_case(*words: str) -> str:
    return "|".join("".join(f"[{letter.lower()}{letter.upper()}]" for letter in word) for word in words)


# Strings that tokenizers of the CLIP, BERT, RoBERTa and T5 families turn into control tokens, in any letter case
# (CLIP's tokenizer lowercases). In a caption they would end the text early or shift its positions.
SPECIAL = "|".join(
    (
        r"<\|[0-9A-Za-z_]{1,40}\|>",
        rf"\[(?:{_any_case('cls', 'sep', 'pad', 'mask', 'unk', 'bos', 'eos')})\]",
        rf"</?(?:{_any_case('s', 'bos', 'eos', 'pad', 'unk', 'mask')})>",
    )
)

_SPECIAL = re.compile(SPECIAL)
_INVISIBLE = frozenset(INVISIBLE)
_HANGUL_FILLERS = str.maketrans(dict.fromkeys(FILLERS, " "))
_BARE = re.compile(rf"[\s{BARE}]*")
_LONGEST = 10_000  # characters; Python's NFC takes time quadratic in a run of combining marks
# The words of pandas, Python and JSON for a missing value. NA and N/A stay, because people write them, too.
_MISSING = frozenset({"nan", "none", "null", "<na>"})
# A list as Python writes it, or without commas an array as numpy does.
_ESCAPE = r"\\(?:[\\'\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"
_NEVER = r"\0\n\r\ud800-\udfff"  # always escaped
_ITEM = rf"""(?:('(?:[^'\\{_NEVER}]|{_ESCAPE})*'|"(?:[^"\\{_NEVER}]|{_ESCAPE})*")|None|nan)"""
_WRITTEN_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*|\s+|(?=\])))*\]")


def normalize(text: str) -> str:
    """Return `text` (its first 10,000 characters) in NFC, single-spaced, without control characters and special tokens.

    Korean in macOS file names and some corpora is decomposed (NFD); many fast tokenizers do not compose it. HTML
    entities, which are frequent in alt texts, are replaced by their characters, as in CLIP's own tokenizer.
    """
    text = _plain(text)
    while "&" in text and (unescaped := _plain(html.unescape(text))) != text:  # &amp;quot; needs two passes
        text = unescaped
    text = _SPECIAL.sub(" ", text)  # last: a special token may appear when other characters are removed
    return "" if _BARE.fullmatch(text) else " ".join(text.split())


def read_list(cell: object) -> object:
    """Parse a list written as text in a CSV cell: `["a", "b"]`, `['a', 'b']`, `['a' 'b']`. Return other cells as is.

    Items are strings; None, nan and null stand for missing items. For a written list of objects return None: it holds
    no captions. Text that only begins with a bracket is returned unchanged.
    """
    if not isinstance(cell, str) or not (text := cell.strip()).startswith("["):
        return cell
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        if _WRITTEN_LIST.fullmatch(text):
            return [ast.literal_eval(item) if item else None for item in re.findall(_ITEM, text)]
        return None if text.startswith("[{") and text.endswith("}]") else cell
    if any(isinstance(item, (dict, list)) for item in items):
        return None
    return items if all(item is None or isinstance(item, str) for item in items) else cell


def clean_captions(cell: object) -> list[str]:
    """Return the captions in a table cell, which holds a string, a list of strings, or a list written as text.

    Positions are kept: "" stands for an unusable item, that is, an empty string, a missing value, a word for a missing
    value such as "nan", or a value that is not text. A cell without any usable caption gives [].
    """
    cell = read_list(cell)
    values: Iterable[object] = cell if isinstance(cell, (list, tuple)) else [cell]
    captions = [_caption(value) for value in values]
    return captions if any(captions) else []


def usable(captions: Iterable[str]) -> list[str]:
    """Return the captions that are not empty."""
    return [caption for caption in captions if caption]


def paired(first: Sequence[object], second: Sequence[object]) -> list[int] | None:
    """Return the positions at which a row has a caption in both languages; None if the numbers of captions differ."""
    if len(first) != len(second):
        return None
    return [place for place, captions in enumerate(zip(first, second, strict=True)) if all(captions)]


def _caption(value: object) -> str:
    """Return a value as a clean caption; "" if it is not text or stands for a missing value."""
    caption = normalize(value) if isinstance(value, str) else ""
    return "" if caption.lower() in _MISSING else caption


def _plain(text: str) -> str:
    """Return the beginning of a text in NFC, without invisible characters."""
    text = text.translate(_HANGUL_FILLERS)
    if not text.isprintable():
        text = "".join(character for character in text if _is_text(character))
    return unicodedata.normalize("NFC", text[:_LONGEST])


def _is_text(character: str) -> bool:
    """Return whether a character is white space or visible."""
    return character not in _INVISIBLE and unicodedata.category(character) != "Cs"
