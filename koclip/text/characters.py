"""What is no part of a text, once: `normalize` leaves it out in Python, `cleaning` in a tokenizer's own files.

Patterns mean the same in Python, in `tokenizers` (Oniguruma) and in transformers.js: no flags, no classes such as \\w.
"""

import unicodedata

_BASIC = [chr(code) for code in range(0x10000)]  # no space and no control character is beyond them
SPACES = "".join(filter(str.isspace, _BASIC))
FILLERS = "\u3164\uffa0"  # of Hangul: letters by category, blanks on the screen
# Soft hyphen, zero-width space, direction marks, word joiner, byte-order mark. The zero-width joiners stay: emoji
# and some scripts are spelt with them.
_MARKS = "\u00ad\u061c\u180e\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff" + "".join(
    chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x2070))
)
_CONTROLS = "".join(letter for letter in _BASIC if unicodedata.category(letter) == "Cc" and not letter.isspace())
INVISIBLE = _MARKS + _CONTROLS
# Nothing to be seen in a text without a letter: joiners, variation selectors and the fillers of incomplete syllables.
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
