"""Hangul syllables as letters (jamo), as keys of the two-set keyboard (두벌식, KS X 5002), and in Latin letters.

`romanize` follows the Revised Romanization (로마자 표기법, 2000), by the pronunciation of a word.

It writes final consonants and liaison (꽃이 kkochi, 꽃 kkot), assimilation (신라 silla, 독립 dongnip),
palatalisation (같이 gachi) and aspiration (좋다 jota, 잡힌 japin). It does not write tensing (압구정 apgujeong)
and vowel length; 의 is always ui. Nouns keep an h after k, t, p (국화 gukhwa), and so do their verbs in 하다
(시작하다 sijakhada): only 히 and 혀, the suffixes of passive and causative verbs, lose it.

Not supported: hyphens, capitals of names, liaison across a space (옷 안); and sounds inside compounds, except in words
of `assets/stress_romanization.tsv` (풀잎 pullip, 맛없다 madeopda). Hanja, digits and single letters (ㅋㅋ) stay.
"""

import functools
import itertools
import re

from koclip.storage import read_table

ONSETS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
CODAS = ("", *"ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")
# Vowels and final consonants that are two letters.
_VOWEL_PAIRS = {"ㅘ": "ㅗㅏ", "ㅙ": "ㅗㅐ", "ㅚ": "ㅗㅣ", "ㅝ": "ㅜㅓ", "ㅞ": "ㅜㅔ", "ㅟ": "ㅜㅣ", "ㅢ": "ㅡㅣ"}
_CODA_PAIRS = {"ㄳ": "ㄱㅅ", "ㄵ": "ㄴㅈ", "ㄶ": "ㄴㅎ", "ㄺ": "ㄹㄱ", "ㄻ": "ㄹㅁ", "ㄼ": "ㄹㅂ", "ㄽ": "ㄹㅅ"}
_CODA_PAIRS |= {"ㄾ": "ㄹㅌ", "ㄿ": "ㄹㅍ", "ㅀ": "ㄹㅎ", "ㅄ": "ㅂㅅ"}
PAIRS = _VOWEL_PAIRS | _CODA_PAIRS

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each row stands half a key to the right of the one above
_KEY_AT = {(row, column): key for row, keys in enumerate(_ROWS) for column, key in enumerate(keys)}
_LETTER_OF = dict(zip("".join(_ROWS), "ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ", strict=True))
_LETTER_OF |= dict(zip("QWERTOP", "ㅃㅉㄸㄲㅆㅒㅖ", strict=True))
_KEY_OF = {letter: key for key, letter in _LETTER_OF.items()}

_TYPED_VOWELS = "".join(letter for letter in VOWELS if letter not in PAIRS)
_VOWEL = "|".join([*_VOWEL_PAIRS.values(), f"[{_TYPED_VOWELS}]"])
_CODA = "|".join([*_CODA_PAIRS.values(), f"[{''.join(CODAS)}]"])
# A consonant before a vowel begins the next syllable, so it is not a final one.
_TYPED = re.compile(f"([{ONSETS}])({_VOWEL})((?:{_CODA})(?![{_TYPED_VOWELS}]))?|({_VOWEL})")
_PAIR_OF = {two: pair for pair, two in PAIRS.items()}


def is_syllable(character: str) -> bool:
    """Return whether `character` is a composed syllable."""
    return "가" <= character <= "힣"


def letters(syllable: str) -> tuple[str, str, str]:
    """Return a syllable's initial consonant, vowel and final consonant ("" for none): 닭 is ㄷ, ㅏ, ㄺ."""
    code = ord(syllable) - ord("가")
    return ONSETS[code // 588], VOWELS[code // 28 % 21], CODAS[code % 28]


def compose(onset: str, vowel: str, coda: str = "") -> str:
    """Return the syllable with these letters; the inverse of `letters`."""
    return chr(ord("가") + ONSETS.index(onset) * 588 + VOWELS.index(vowel) * 28 + CODAS.index(coda))


def coda(word: str) -> str:
    """Return the final consonant of a word that ends in a syllable, "" for none."""
    return letters(word[-1])[2]


def with_coda(word: str, coda: str) -> str:
    """Return a word that ends in a syllable with its final consonant replaced: with_coda("가", "ㄴ") is "간"."""
    return word[:-1] + compose(*letters(word[-1])[:2], coda)


def spell(text: str) -> str:
    """Return `text` as the letters that one types: 닭과 is ㄷㅏㄹㄱㄱㅗㅏ. Everything else stays."""
    parts = (letter for character in text for letter in (letters(character) if is_syllable(character) else character))
    return "".join(PAIRS.get(letter, letter) for letter in parts)


def keystrokes(text: str) -> str:
    """Return the keys that type `text`, capitals with shift: 고양이 is rhdiddl. Everything else stays."""
    return "".join(_KEY_OF.get(letter, letter) for letter in spell(text))


def typed(keys: str) -> str:
    """Return the text that a Korean input method types for `keys`; the inverse of `keystrokes` for syllables."""
    line = "".join(_LETTER_OF.get(key) or _LETTER_OF.get(key.lower(), key) for key in keys)
    return _TYPED.sub(_syllable, line)


def _syllable(match: re.Match[str]) -> str:
    onset, vowel, coda, lone = (_PAIR_OF.get(part, part) for part in match.groups(default=""))
    return lone or compose(onset, vowel, coda)


def neighbours(key: str) -> list[str]:
    """Return the letter keys next to `key`; for a capital, the keys with shift if that gives another letter."""
    row, column = next(place for place, letter in _KEY_AT.items() if letter == key.lower())
    around = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))
    near = [_KEY_AT[place] for down, right in around if (place := (row + down, column + right)) in _KEY_AT]
    return near if key.islower() else [each.upper() if each.upper() in _LETTER_OF else each for each in near]


_ONSETS_IN_LATIN = ("g", "kk", "n", "d", "tt", "r", "m", "b", "pp", "s", "ss", "", "j", "jj", "ch", "k", "t", "p", "h")
_LATIN_ONSETS = dict(zip(ONSETS, _ONSETS_IN_LATIN, strict=True))
_VOWELS_IN_LATIN = (
    *("a", "ae", "ya", "yae", "eo", "e", "yeo", "ye", "o", "wa", "wae"),
    *("oe", "yo", "u", "wo", "we", "wi", "yu", "eu", "ui", "i"),
)
_LATIN_VOWELS = dict(zip(VOWELS, _VOWELS_IN_LATIN, strict=True))
_LATIN_CODAS = {"": "", "ㄱ": "k", "ㄴ": "n", "ㄷ": "t", "ㄹ": "l", "ㅁ": "m", "ㅂ": "p", "ㅇ": "ng"}

# A final consonant as it sounds before a pause or another consonant: one of seven.
_PAUSE = {letter: letter for letter in ("", *"ㄱㄴㄷㄹㅁㅂㅇ")}
_PAUSE |= dict.fromkeys("ㄲㅋㄳㄺ", "ㄱ") | dict.fromkeys("ㅅㅆㅈㅊㅌㅎ", "ㄷ") | dict.fromkeys("ㅍㅄㄿ", "ㅂ")
_PAUSE |= {"ㄵ": "ㄴ", "ㄶ": "ㄴ", "ㄻ": "ㅁ", "ㄼ": "ㄹ", "ㄽ": "ㄹ", "ㄾ": "ㄹ", "ㅀ": "ㄹ"}
_NASAL = {"ㄱ": "ㅇ", "ㄷ": "ㄴ", "ㅂ": "ㅁ"}
_ASPIRATED = {"ㄱ": "ㅋ", "ㄷ": "ㅌ", "ㅂ": "ㅍ", "ㅈ": "ㅊ"}
_NOUNS_IN_RIEUL_GIYEOK = "닭흙칡슭"  # in verbs and adjectives, ㄺ sounds ㄹ before ㄱ: 맑게 malge, but 닭과 dakgwa
_SUFFIX_CODAS = {"ㅣ": ("", *"ㄴㄹㅁㅂ"), "ㅕ": ("", "ㅆ")}  # 히 힌 힐 힘 힙, 혀 혔

_RUN = re.compile("[가-힣]+")


def romanize(text: str) -> str:
    """Return `text` with its syllables in Latin letters; everything else stays."""
    for word, sound in _respelt():
        text = text.replace(word, sound)
    return _RUN.sub(lambda run: _latin(run[0]), text)


@functools.cache
def _respelt() -> list[tuple[str, str]]:
    """Return words and the spelling of their sound, the longest words first."""
    table = [(word, sound) for word, sound in read_table("stress_romanization.tsv")]
    return sorted(table, key=lambda pair: -len(pair[0]))


def _latin(run: str) -> str:
    """Return a run of syllables in Latin letters."""
    sounds = [list(letters(syllable)) for syllable in run]
    for place, (here, there) in enumerate(itertools.pairwise(sounds)):
        here[2], there[0] = _meet(here[2], there, run[place])
    sounds[-1][2] = _PAUSE[sounds[-1][2]]
    latin, before = "", ""
    for onset, vowel, coda in sounds:
        latin += "l" if before == onset == "ㄹ" else _LATIN_ONSETS[onset]
        latin += _LATIN_VOWELS[vowel] + _LATIN_CODAS[coda]
        before = coda
    return latin


def _meet(coda: str, following: list[str], syllable: str) -> tuple[str, str]:
    """Return the sounds of the final consonant of `syllable` and of the initial one of the `following` syllable."""
    onset, vowel, final = following
    kept, moved = (PAIRS[coda][0], PAIRS[coda][1]) if coda in PAIRS else ("", coda)
    if onset == "ㅇ":
        if coda in ("", "ㅇ"):
            return coda, onset
        if moved == "ㅎ":  # silent
            return ("", kept or "ㅇ")
        if moved in "ㄷㅌ" and vowel in "ㅣㅕ":
            moved = "ㅈ" if moved == "ㄷ" else "ㅊ"
        return kept, moved
    if onset == "ㅎ" and moved and moved in "ㄱㄷㅂㅈ" and final in _SUFFIX_CODAS.get(vowel, ()):
        return kept, "ㅊ" if moved == "ㄷ" else _ASPIRATED[moved]
    if moved == "ㅎ":
        if onset in _ASPIRATED:
            return kept, _ASPIRATED[onset]
        coda = kept or {"ㄴ": "ㄴ", "ㅅ": "", "ㅎ": ""}.get(onset, "ㄷ")
    elif coda == "ㄺ" and onset == "ㄱ" and syllable not in _NOUNS_IN_RIEUL_GIYEOK:
        coda = "ㄹ"
    elif syllable == "밟":
        coda = "ㅂ"
    return _assimilate(_PAUSE[coda], onset)


def _assimilate(coda: str, onset: str) -> tuple[str, str]:
    if onset in "ㄴㅁ" and coda in _NASAL:
        return _NASAL[coda], onset
    if onset == "ㄹ" and coda not in ("", "ㄴ", "ㄹ"):
        return _NASAL.get(coda, coda), "ㄴ"
    if {coda, onset} == {"ㄴ", "ㄹ"}:
        return "ㄹ", "ㄹ"
    return coda, onset
