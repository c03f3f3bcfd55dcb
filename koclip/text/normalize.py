"""Clean captions: one Unicode form, single spaces, no HTML entities, invisible characters and special-token strings."""

import ast
import html
import json
import re
import unicodedata
from collections.abc import Iterable

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
# What pandas, Python and JSON write for "no value". NA, N/A and the like, which people write too, stay.
_MISSING = frozenset({"nan", "none", "null", "<na>"})
# A list as Python writes it, or without commas an array as numpy does.
_ESCAPE = r"\\(?:[\\'\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"
_NEVER = r"\0\n\r\ud800-\udfff"  # always escaped
_ITEM = rf"""(?:('(?:[^'\\{_NEVER}]|{_ESCAPE})*'|"(?:[^"\\{_NEVER}]|{_ESCAPE})*")|None|nan)"""
_WRITTEN_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*|\s+|(?=\])))*\]")


def normalize(text: str) -> str:
    """Return `text` (its first 10,000 characters) in NFC, single-spaced, without control characters and special tokens.

    Korean comes decomposed (NFD) from macOS file names and some corpora; many fast tokenizers do not compose it.
    HTML entities, which alt texts are full of, become the characters that they stand for, as in CLIP's own tokenizer.
    """
    text = _plain(text)
    while "&" in text and (unescaped := _plain(html.unescape(text))) != text:  # &amp;quot; holds two
        text = unescaped
    text = _SPECIAL.sub(" ", text)  # last: what was removed above may have hidden one
    return "" if _BARE.fullmatch(text) else " ".join(text.split())


def read_list(cell: object) -> object:
    """Return the list that a cell's text is, as in CSV files: `["a", "b"]`, `['a', 'b']`, `['a' 'b']`; else the cell.

    Its items are strings, or None, nan and null for missing ones. Written lists of objects hold no text: None. Text
    that only begins with a bracket stays text.
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
    """Return the usable captions in a table cell: a string, a list of strings, or anything else (no caption).

    A text that is a written list is that list. Empty strings, missing values, their spelt-out forms such as "nan", and
    values that are not text are left out.
    """
    cell = read_list(cell)
    values: Iterable[object] = cell if isinstance(cell, (list, tuple)) else [cell]
    cleaned = (normalize(value) for value in values if isinstance(value, str))
    return [caption for caption in cleaned if caption and caption.lower() not in _MISSING]


def _plain(text: str) -> str:
    """Return the beginning of a text in NFC, without invisible characters."""
    text = text.translate(_HANGUL_FILLERS)
    if not text.isprintable():
        text = "".join(character for character in text if _is_text(character))
    return unicodedata.normalize("NFC", text[:_LONGEST])


def _is_text(character: str) -> bool:
    """Tell white space and visible characters from control characters, lone surrogates and invisible ones."""
    if character.isspace():
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in _INVISIBLE
