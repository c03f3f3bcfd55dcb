"""Clean captions: one Unicode form, single spaces, no special-token strings."""

import re
import unicodedata
from collections.abc import Iterable

# Strings that tokenizers of CLIP, BERT, RoBERTa and T5 families turn into control tokens.
# In a caption they would end the text early or shift its positions.
_SPECIAL = re.compile(
    r"<\|(?:startoftext|endoftext|im_start|im_end)\|>|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]|</?(?:s|pad|unk|mask)>"
)
# Control and unassigned code points and lone surrogates; a tab or a newline is white space, handled apart.
_UNPRINTABLE = {"Cc", "Cs", "Cn"}


def normalize(text: str) -> str:
    """Return `text` in NFC, without special-token strings and control characters, white space collapsed.

    Korean comes decomposed (NFD) from macOS file names and some corpora; many fast tokenizers do not compose it.
    """
    text = unicodedata.normalize("NFC", text)
    text = _SPECIAL.sub(" ", text)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in _UNPRINTABLE)
    return " ".join(text.split())


def clean_captions(cell: object) -> list[str]:
    """Return the usable captions in a table cell: a string, a list of strings, or anything else (no caption).

    Empty strings, missing values and values that are not text are left out.
    """
    values: Iterable[object] = cell if isinstance(cell, (list, tuple)) else [cell]
    cleaned = (normalize(value) for value in values if isinstance(value, str))
    return [caption for caption in cleaned if caption]
