"""Hangul syllables as letters (jamo), and letters as keys of the two-set keyboard (두벌식, KS X 5002)."""

import re

ONSETS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
CODAS = ("", *"ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")
# Two letters in one place: of the vowels, and of the final consonants.
_VOWEL_PAIRS = {"ㅘ": "ㅗㅏ", "ㅙ": "ㅗㅐ", "ㅚ": "ㅗㅣ", "ㅝ": "ㅜㅓ", "ㅞ": "ㅜㅔ", "ㅟ": "ㅜㅣ", "ㅢ": "ㅡㅣ"}
_CODA_PAIRS = {"ㄳ": "ㄱㅅ", "ㄵ": "ㄴㅈ", "ㄶ": "ㄴㅎ", "ㄺ": "ㄹㄱ", "ㄻ": "ㄹㅁ", "ㄼ": "ㄹㅂ", "ㄽ": "ㄹㅅ"}
_CODA_PAIRS |= {"ㄾ": "ㄹㅌ", "ㄿ": "ㄹㅍ", "ㅀ": "ㄹㅎ", "ㅄ": "ㅂㅅ"}
PAIRS = _VOWEL_PAIRS | _CODA_PAIRS

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each row stands half a key to the right of the one above
_LETTER_OF = dict(zip("".join(_ROWS), "ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ", strict=True))
_LETTER_OF |= dict(zip("QWERTOP", "ㅃㅉㄸㄲㅆㅒㅖ", strict=True))
_KEY_OF = {letter: key for key, letter in _LETTER_OF.items()}

_TYPED_VOWELS = "".join(letter for letter in VOWELS if letter not in PAIRS)
_VOWEL = "|".join([*_VOWEL_PAIRS.values(), f"[{_TYPED_VOWELS}]"])
_CODA = "|".join([*_CODA_PAIRS.values(), f"[{''.join(CODAS)}]"])
# A consonant before a vowel begins the next syllable, so no final one is taken there.
_TYPED = re.compile(f"([{ONSETS}])({_VOWEL})((?:{_CODA})(?![{_TYPED_VOWELS}]))?|({_VOWEL})")
_PAIR_OF = {two: pair for pair, two in PAIRS.items()}


def is_syllable(character: str) -> bool:
    """Tell whether `character` is a composed syllable."""
    return "가" <= character <= "힣"


def letters(syllable: str) -> tuple[str, str, str]:
    """Return a syllable's initial consonant, vowel and final consonant ("" if none): 닭 is ㄷ, ㅏ, ㄺ."""
    code = ord(syllable) - ord("가")
    return ONSETS[code // 588], VOWELS[code // 28 % 21], CODAS[code % 28]


def compose(onset: str, vowel: str, coda: str = "") -> str:
    """Return the syllable of these letters; the reverse of `letters`."""
    return chr(ord("가") + ONSETS.index(onset) * 588 + VOWELS.index(vowel) * 28 + CODAS.index(coda))


def coda(word: str) -> str:
    """Return the final consonant of a word that ends in a syllable, "" if it has none."""
    return letters(word[-1])[2]


def with_coda(word: str, coda: str) -> str:
    """Return a word that ends in a syllable with another final consonant: with_coda("가", "ㄴ") is "간"."""
    return word[:-1] + compose(*letters(word[-1])[:2], coda)


def spell(text: str) -> str:
    """Return `text` in the single letters that are typed for it: 닭과 is ㄷㅏㄹㄱㄱㅗㅏ. What is no Hangul stays."""
    parts = (letter for character in text for letter in (letters(character) if is_syllable(character) else character))
    return "".join(PAIRS.get(letter, letter) for letter in parts)


def keystrokes(text: str) -> str:
    """Return the keys that type `text`, capitals with shift: 고양이 is rhdiddl. What is no modern Hangul stays."""
    return "".join(_KEY_OF.get(letter, letter) for letter in spell(text))


def typed(keys: str) -> str:
    """Return what a Korean input method makes of `keys`; the reverse of `keystrokes` for runs of syllables."""
    line = "".join(_LETTER_OF.get(key) or _LETTER_OF.get(key.lower(), key) for key in keys)
    return _TYPED.sub(_syllable, line)


def _syllable(match: re.Match[str]) -> str:
    onset, vowel, coda, lone = (_PAIR_OF.get(part, part) for part in match.groups(default=""))
    return lone or compose(onset, vowel, coda)


def neighbours(key: str) -> list[str]:
    """Return the letter keys that touch `key`; with shift held where they have a letter of their own for it."""
    row = next(number for number, keys in enumerate(_ROWS) if key.lower() in keys)
    column = _ROWS[row].index(key.lower())
    places = [(0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0)]
    near = [
        _ROWS[row + down][column + right]
        for down, right in places
        if 0 <= row + down < len(_ROWS) and 0 <= column + right < len(_ROWS[row + down])
    ]
    return (
        near
        if key.islower()
        else [neighbour.upper() if neighbour.upper() in _LETTER_OF else neighbour for neighbour in near]
    )
