"""Rewrite a Korean text in the ways in which people really write, for the evaluation task `stress`.

`STRESSES` maps names to functions of a text and a seed. The same text and seed give the same result on every machine;
functions without random choices ignore the seed. All functions first compose the text (NFC), and all except `nfd`
return composed text. A text without Hangul stays unchanged. No string raises an error.
"""

import functools
import random
import re
import unicodedata
from collections.abc import Callable

from koclip.storage import read_table
from koclip.text.korean.endings import restyle
from koclip.text.korean.hangul import is_syllable, keystrokes, neighbours, romanize, spell, typed
from koclip.text.korean.particles import drop_particles, replace_nouns

Stress = Callable[[str, int], str]

_HANGUL = re.compile("[ㄱ-ㆎ가-힣]")
_SPACE = re.compile(r"\s+")
_SYLLABLES = re.compile("([가-힣]+)")


def _korean(change: Stress) -> Stress:
    """Call `change` only with composed text that contains Hangul, and compose its result."""

    @functools.wraps(change)
    def stress(text: str, seed: int) -> str:
        composed = unicodedata.normalize("NFC", text)
        return unicodedata.normalize("NFC", change(composed, seed)) if _HANGUL.search(composed) else text

    return stress


def _generator(purpose: str, text: str, seed: int) -> random.Random:
    return random.Random(f"{purpose} {seed} {text!a}")  # ascii: a lone surrogate has no bytes in UTF-8


@_korean
def no_spaces(text: str, seed: int) -> str:
    """Remove white space next to Hangul: 빨간 공 -> 빨간공. Spaces between words in other scripts stay."""

    def squeeze(space: re.Match[str]) -> str:
        around = text[max(space.start() - 1, 0) : space.start()] + text[space.end() : space.end() + 1]
        return "" if _HANGUL.search(around) else space[0]

    return _SPACE.sub(squeeze, text)


@_korean
def moved_spaces(text: str, seed: int) -> str:
    """Move half of the spaces between syllables by one syllable to the left or right: 빨간 자전거 -> 빨간자 전거.

    Their number stays. Typical positions of wrong spaces (before particles, inside compounds) are not imitated.
    """
    words = text.split(" ")
    gaps = [gap for gap in range(len(words) - 1) if _moves(words, gap)]
    rng = _generator("moved_spaces", text, seed)
    for gap in sorted(rng.sample(gaps, (len(gaps) + 1) // 2)):
        moves = _moves(words, gap)
        if moves:  # empty if an earlier move has left only one syllable
            words[gap], words[gap + 1] = rng.choice(moves)
    return " ".join(words)


def _moves(words: list[str], gap: int) -> list[tuple[str, str]]:
    """Return the possible pairs of words after the space between two words moves."""
    left, right = words[gap], words[gap + 1]
    if not left or not right or not is_syllable(left[-1]) or not is_syllable(right[0]):
        return []
    moves = [(left[:-1], left[-1] + right)] if left[-2:-1].isalnum() else []  # leave no punctuation mark alone
    return [*moves, (left + right[0], right[1:])] if right[1:2].isalnum() else moves


def _slip(text: str, count: int, rng: random.Random) -> str:
    """Replace `count` keystrokes of syllables by neighbouring letter keys, with the same shift state.

    Missing, doubled and swapped keystrokes and phone keyboards are not imitated.
    """
    parts = _SYLLABLES.split(text)  # every second part is a run of syllables
    lines = [list(keystrokes(run)) for run in parts[1::2]]
    places = [(line, place) for line in lines for place in range(len(line))]
    for line, place in rng.sample(places, min(count, len(places))):
        line[place] = rng.choice(neighbours(line[place]))
    parts[1::2] = [typed("".join(line)) for line in lines]
    return "".join(parts)


def nfd(text: str, seed: int) -> str:
    """Decompose the text (NFD), as macOS does in file names; it looks the same."""
    return unicodedata.normalize("NFD", text) if _HANGUL.search(unicodedata.normalize("NFC", text)) else text


@_korean
def english_nouns(text: str, seed: int) -> str:
    """Replace half of the known nouns, at random, by English, with fitting particles: 개가 -> dog가.

    Only nouns in `assets/stress_english.tsv` change, and only with known particles. No plurals: 개들 -> dog들.
    """
    rng = _generator("english_nouns", text, seed)
    names = _names("stress_english.tsv")
    return replace_nouns(text, names, lambda count: rng.sample(range(count), (count + 1) // 2))


@functools.cache
def _names(table: str) -> dict[str, str]:
    return {noun: name for noun, name in read_table(table)}


STRESSES: dict[str, Stress] = {
    "no_spaces": no_spaces,
    "moved_spaces": moved_spaces,
    # One or two keystrokes hit a neighbouring key of the two-set keyboard: 고양이 -> 거양이, or ㄱㅎ양이.
    "typo": _korean(lambda text, seed: _slip(text, 1, _generator("typo", text, seed))),
    "two_typos": _korean(lambda text, seed: _slip(text, 2, _generator("two_typos", text, seed))),
    # The two-set keyboard is in Latin mode: 고양이 -> rhdiddl, 빨간 -> Qkfrks.
    "wrong_input_mode": _korean(lambda text, seed: keystrokes(text)),
    "nfd": nfd,
    # Separate letters, one per keystroke: 고양이 -> ㄱㅗㅇㅑㅇㅇㅣ, 닭과 -> ㄷㅏㄹㄱㄱㅗㅏ.
    "jamo": _korean(lambda text, seed: spell(text)),
    # 공을 문 개가 공원에서 -> 공 문 개 공원.
    "no_particles": _korean(lambda text, seed: drop_particles(text)),
    # Styles of sentence ends: 해라체 달린다, 해요체 달려요, 합쇼체 달립니다.
    "plain": _korean(lambda text, seed: restyle(text, "plain")),
    "polite": _korean(lambda text, seed: restyle(text, "polite")),
    "formal": _korean(lambda text, seed: restyle(text, "formal")),
    # Native and Sino-Korean nouns become English loanwords: 부엌에서 -> 키친에서, 춤을 -> 댄스를. Only listed nouns
    # with known particles change; no verbs, no compounds.
    "loanwords": _korean(lambda text, seed: replace_nouns(text, _names("stress_loanwords.tsv"), range)),
    # The Revised Romanization: 고양이 -> goyangi.
    "romanized": _korean(lambda text, seed: romanize(text)),
    "english_nouns": english_nouns,
}
