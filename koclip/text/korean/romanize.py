"""Write Korean in Latin letters by the Revised Romanization (로마자 표기법, 2000), as it is pronounced.

Sound changes that it writes: final consonants and liaison (꽃이 kkochi, 꽃 kkot), assimilation (신라 silla, 독립
dongnip), palatalisation (같이 gachi), aspiration (좋다 jota, 잡힌 japin). Those that it does not write: tensing (압구정
apgujeong), vowel length; 의 is always ui. Nouns keep an h after k, t, p (국화 gukhwa), and so do their verbs in 하다
(시작하다 sijakhada): only 히 and 혀, the suffix of passive and causative verbs, melt.

Left out: hyphens, capitals of names, ㄴ added inside compounds and finals that stop at their seam, but for the words of
`assets/stress_romanization.tsv` (풀잎 pullip, 맛없다 madeopda); words that sound together across a space (옷 안).
Hanja, digits and letters that stand alone (ㅋㅋ) stay as they are.
"""

import functools
import itertools
import re

from koclip.text import read_table
from koclip.text.korean.hangul import ONSETS, PAIRS, VOWELS, letters

_ONSETS_IN_LATIN = (
    *("g", "kk", "n", "d", "tt", "r", "m", "b", "pp", "s"),
    *("ss", "", "j", "jj", "ch", "k", "t", "p", "h"),
)
_VOWELS_IN_LATIN = (
    *("a", "ae", "ya", "yae", "eo", "e", "yeo", "ye", "o", "wa", "wae"),
    *("oe", "yo", "u", "wo", "we", "wi", "yu", "eu", "ui", "i"),
)
_LATIN_ONSETS = dict(zip(ONSETS, _ONSETS_IN_LATIN, strict=True))
_LATIN_VOWELS = dict(zip(VOWELS, _VOWELS_IN_LATIN, strict=True))
_LATIN_CODAS = {"": "", "ㄱ": "k", "ㄴ": "n", "ㄷ": "t", "ㄹ": "l", "ㅁ": "m", "ㅂ": "p", "ㅇ": "ng"}

# A final consonant as it sounds before a pause or another consonant: one of seven.
_PAUSE = {letter: letter for letter in ("", *"ㄱㄴㄷㄹㅁㅂㅇ")}
_PAUSE |= dict.fromkeys("ㄲㅋㄳㄺ", "ㄱ") | dict.fromkeys("ㅅㅆㅈㅊㅌㅎ", "ㄷ") | dict.fromkeys("ㅍㅄㄿ", "ㅂ")
_PAUSE |= {"ㄵ": "ㄴ", "ㄶ": "ㄴ", "ㄻ": "ㅁ", "ㄼ": "ㄹ", "ㄽ": "ㄹ", "ㄾ": "ㄹ", "ㅀ": "ㄹ"}
_NASAL = {"ㄱ": "ㅇ", "ㄷ": "ㄴ", "ㅂ": "ㅁ"}
_ASPIRATED = {"ㄱ": "ㅋ", "ㄷ": "ㅌ", "ㅂ": "ㅍ", "ㅈ": "ㅊ"}
_NOUNS_IN_RIEUL_GIYEOK = "닭흙칡슭"  # of others, verbs and adjectives, ㄺ sounds ㄹ before ㄱ: 맑게 malge, 닭과 dakgwa
_SUFFIX_CODAS = {"ㅣ": ("", *"ㄴㄹㅁㅂ"), "ㅕ": ("", "ㅆ")}  # 히 힌 힐 힘 힙, 혀 혔

_RUN = re.compile("[가-힣]+")


def romanize(text: str) -> str:
    """Return `text` with its syllables in Latin letters, everything else as it is."""
    for word, sound in _respelt():
        text = text.replace(word, sound)
    return _RUN.sub(lambda run: _latin(run[0]), text)


@functools.cache
def _respelt() -> list[tuple[str, str]]:
    """Return words and spellings of their sound: the lines of assets/stress_romanization.tsv, longest first."""
    table = [(word, sound) for word, sound in read_table("stress_romanization.tsv")]
    return sorted(table, key=lambda pair: -len(pair[0]))


def _latin(run: str) -> str:
    """Return the sound of one word."""
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
    """Return how the final consonant of `syllable` and the initial one of the `following` syllable sound together."""
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
