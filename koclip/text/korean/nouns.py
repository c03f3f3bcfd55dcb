"""Find nouns and their particles (조사), to drop the particles or to replace the nouns.

Whether 이, 은, 을 and others at the end of a word are particles depends on the sound before them (one form of a pair
follows consonants, the other vowels), on final consonants that almost no noun has (많이, 같은, 앉을), and on the lists
in `assets/stress_particles.tsv`. In doubt the word stays unchanged. 는 is a particle only after listed nouns, because
elsewhere it usually ends a verb (달리는).
"""

import functools
import re
from collections.abc import Callable, Collection

from koclip.storage import read_table
from koclip.text.korean.hangul import coda, is_syllable
from koclip.text.korean.particles import particle

_WORD = re.compile(r"[^\W_]+")
_PLACES = ("에게서", "에게", "께서", "에서", "으로", "로", "에", "과", "와")  # 는 and 의 can follow them: 에서는, 와의
_DROPPED = (*_PLACES, "은", "는", "이", "가", "을", "를", "의")
_AFTER_CONSONANT, _AFTER_VOWEL = ("은", "이", "을", "과", "이랑"), ("는", "가", "를", "와", "랑")
_PREDICATE_CODAS = ("ㄷ", "ㄵ", "ㄶ", "ㄾ", "ㄿ", "ㅀ", "ㅆ", "ㅎ")  # no nouns, except 디귿, 히읗 and similar names
_MOSTLY_PREDICATE_CODAS = ("ㄲ", "ㄳ", "ㄺ", "ㄻ", "ㄼ", "ㅄ", "ㅈ", "ㅊ", "ㅌ", "ㅍ")  # except nouns that end in:
_NOUN_ENDS = "밖넋몫닭흙칡슭삶덟값빚꽃빛숯돛덫낯닻몇윷끝밑밭겉곁솥팥숱뭍볕앞옆숲잎릎늪짚겊"
_CONNECTIVES = "아어여려러라쳐져켜겨와워"  # ends of a verb before another verb: 차려입은, 내려앉은
_BOUND_NOUNS = ("때", "수", "것", "듯", "만큼", "뻔", "준비")  # before them 입을 is a form of a verb
_COUNTER = "개"  # after a number it may count things (별 세 개) and stays, though 두 개 may mean two dogs
_NUMBER = re.compile(
    r"(?:\d|한|하나|두|둘|세|셋|네|넷|석|넉|닷|댓|다섯|엿|여섯|예닐곱|일곱|일고여덟|여덟|엳아홉|아홉|열|스물|스무|서른|마흔|쉰|예순|"
    r"일흔|여든|아흔|일|이|삼|사|오|육|칠|팔|구|십|백|천|만|억|몇|여러|수|반|어|서너|여남은|여|각|매|낱|다수|온갖|같은)+"
)
# A noun may be followed by 들, then particles; one form of each pair fits.
_PAIRS = {form: pair for pair in ("은/는", "이/가", "을/를", "과/와", "으로/로", "이랑/랑") for form in pair.split("/")}
_SUFFIX = re.compile(
    rf"(들)?({'|'.join(sorted(_PAIRS, key=len, reverse=True))})?"
    r"(에게서|에게|께서|에서|에|의|한테|까지|부터|처럼|보다|마다|만|도|하고|뿐)?(은|는|도|만|의)?"
)


def drop_particles(text: str) -> str:
    """Return `text` without 은/는, 이/가, 을/를, 의, 과/와, 에, 에서, 에게(서), 께서 and (으)로.

    Particles with more meaning stay (도, 만, 까지, 부터, 처럼, 보다 ...), and so do 하고 and (이)랑.
    """
    words = list(_WORD.finditer(text))
    bare, last = "", 0
    for word, following in zip(words, [*(word[0] for word in words[1:]), ""], strict=True):
        bare += text[last : word.start()] + _bare(word[0], following)
        last = word.end()
    return bare + text[last:]


def replace_nouns(text: str, names: dict[str, str], which: Callable[[int], Collection[int]]) -> str:
    """Return `text` with nouns replaced, and their particles in the form that fits.

    Args:
        text: A text in NFC.
        names: The replacement of each noun.
        which: Takes the number of nouns in the text and returns the indices of the nouns to replace.
    """
    words = list(_WORD.finditer(text))
    around = ["", *(word[0] for word in words), ""]
    nouns = []
    for word, before, following in zip(words, around, around[2:], strict=False):
        noun = _noun(word[0], names, following)
        if noun and not (noun == _COUNTER and _NUMBER.fullmatch(before)):
            nouns.append((word, noun))
    replaced, last, chosen = "", 0, which(len(nouns))
    for number, (word, noun) in enumerate(nouns):
        if number in chosen:
            name = names[noun]
            replaced += text[last : word.start()] + name + _refit(name, word[0].removeprefix(noun))
            last = word.end()
    return replaced + text[last:]


def _bare(word: str, following: str) -> str:
    stem, last = split(word, following)
    if last in ("는", "의"):
        inner, place = split(stem, "")
        return inner if place in _PLACES else stem
    return stem


def split(word: str, following: str = "") -> tuple[str, str]:
    """Return the noun in `word` and its last particle, or `word` and "" if it has none that `drop_particles` drops.

    Args:
        word: Letters and digits without a space.
        following: The next word, or "".
    """
    for last in _DROPPED:
        stem = word.removesuffix(last)
        if stem and stem != word and _is_particle(stem, last, following):
            return stem, last
    return word, ""


def _is_particle(stem: str, last: str, following: str) -> bool:
    """Return whether `last` is a particle after `stem`."""
    if not is_syllable(stem[-1]):
        return stem[-1].isalnum()  # TV를, 3의
    final = coda(stem)
    word = stem + last
    is_word = "word" in _kinds(word) or ("noun" not in _kinds(stem) and "word" in _kinds(word, ends=True))
    if is_word or not _fits(final, last):
        return False
    if last == "는":
        return "noun" in _kinds(stem) or split(stem)[1] in _PLACES
    if last in ("은", "이", "을") and (
        final in _PREDICATE_CODAS or (final in _MOSTLY_PREDICATE_CODAS and stem[-1] not in _NOUN_ENDS)
    ):
        return False
    return last not in ("은", "을") or not _takes_ending(stem, last, following)


def _fits(final: str, last: str) -> bool:
    if last == "으로":
        return final not in ("", "ㄹ")
    if last == "로":
        return final in ("", "ㄹ")
    return bool(final) if last in _AFTER_CONSONANT else not (final and last in _AFTER_VOWEL)


def _takes_ending(stem: str, last: str, following: str) -> bool:
    """Return whether `stem` is that of a verb or an adjective, and `last` its ending."""
    kinds = _kinds(stem, ends=True)
    if "both" in kinds:
        return last == "은" or following.startswith(_BOUND_NOUNS)
    if "stem" in kinds:
        return True
    shorter = next((stem[start:] for start in range(1, len(stem)) if _kinds(stem[start:]) & {"stem", "both"}), "")
    return bool(shorter) and stem[-len(shorter) - 1] in _CONNECTIVES


@functools.cache
def _listed() -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for form, kind in read_table("stress_particles.tsv"):
        kinds.setdefault(form, set()).add(kind)
    return kinds


def _kinds(form: str, ends: bool = False) -> set[str]:
    """Return the kinds of `form` in the table; with `ends` also the kinds of its listed ends."""
    kinds = set(_listed().get(form, ()))
    for start in range(len(form)) if ends else ():
        kinds |= _listed().get("-" + form[start:], set())
    return kinds


def _noun(word: str, names: dict[str, str], following: str) -> str:
    """Return the noun in `names` that `word` is, with or without particles; else ""."""
    for end in range(len(word), 0, -1):
        noun, suffix = word[:end], word[end:]
        if noun not in names or (suffix and "word" in _kinds(word)) or not _SUFFIX.fullmatch(suffix):
            continue
        form = _paired(suffix)
        if not form or (_fits(coda(noun), form) and not (form in "은을" and _takes_ending(noun, form, following))):
            return noun
    return ""


def _paired(suffix: str) -> str:
    """Return the first particle in the suffix of a noun, if its form depends on the noun; else ""."""
    match = _SUFFIX.fullmatch(suffix)
    return match[2] or "" if match and not match[1] else ""


def _refit(name: str, suffix: str) -> str:
    """Return the suffix with its first particle in the form that follows `name`."""
    form = _paired(suffix)
    return particle(name, _PAIRS[form]) + suffix[len(form) :] if form else suffix
