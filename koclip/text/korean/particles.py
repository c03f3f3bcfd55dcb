"""Choose the Korean particle that fits the word before it, by the pronunciation of that word.

Most particles have one form after a final consonant and another after a vowel (책을, 사과를). -(으)로 also has the
vowel form after a final ㄹ (연필로). Rule: National Institute of Korean Language, Standard Korean Language Dictionary
(stdict.korean.go.kr), entries 은, 이, 을, 과, 으로, 이다. Its Loanword Orthography (chapter 3, section 1) defines the
final consonants of English words.

Everything else than Hangul is read as Koreans read it: `assets/particles.tsv` first (kg: 킬로그램, CLIP: 클립), then
numbers by their Sino-Korean reading (10: 십, 3.5: 삼 점 오, 2/3: 삼분의 이), then Latin letters: initialisms letter by
letter (GPU: 지피유), other words by a heuristic. After other scripts, both forms are written: "을(를)", "(으)로".

`drop_particles` and `replace_nouns` find particles in a text. Whether 이, 은, 을 and others at the end of a word are
particles depends on the sound before them, on final consonants that almost no noun has (많이, 같은, 앉을), and on the
lists in `assets/stress_particles.tsv`. In doubt the word stays unchanged. 는 is a particle only after listed nouns,
because elsewhere it usually ends a verb (달리는).
"""

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Collection

from koclip.storage import read_table
from koclip.text.korean.hangul import CODAS, coda, is_syllable

# after a final consonant / after a vowel
_PAIRS = (
    *("은/는", "이/가", "을/를", "과/와", "으로/로", "으로서/로서", "으로써/로써", "으로부터/로부터"),
    *("이랑/랑", "이나/나", "이든/든", "이든지/든지", "이라도/라도", "이야말로/야말로", "이며/며", "아/야", "이여/여"),
    *("이다/다", "이었다/였다", "이에요/예요", "이야/야", "이고/고", "이지만/지만", "이면/면", "이라면/라면"),
    *("이라/라", "이라고/라고", "이라는/라는", "이란/란", "이던/던"),
)
_FORMS = {pair: tuple(pair.split("/")) for pair in _PAIRS}
_FINAL_RIEUL = 8

_DIGITS = "영일이삼사오육칠팔구"
_SMALL_UNITS = "십백천"  # by the number of trailing zeros
_LARGE_UNITS = "만억조경해자양구간정재극"  # by the number of groups of four trailing zeros
_LETTER_FINALS = {"L": 8, "M": 16, "N": 4, "R": 8}  # 엘 엠 엔 알; every other letter's name ends in a vowel

# Final consonants of English words in Korean: l m n ng always, p t k after a short vowel (cap 캡, but tape 테이프).
_SHORT = r"(?:^|[^aeiou])[aeiouy]"
_ENDINGS = (
    (re.compile(r"ng$"), 21),
    (re.compile(r"l$|[aeiouy].*le$"), 8),
    (re.compile(r"mb?$|[aeiouy].*me$"), 16),
    (re.compile(r"n$|[aeiouy].*ne$"), 4),
    (re.compile(_SHORT + r"pp?$"), 17),
    (re.compile(_SHORT + r"t$"), 19),
    (re.compile(_SHORT + r"(?:c|k|ck)$|ook$"), 1),
)
_INITIALISM = re.compile(r"(?:^|[a-z])[A-Z]{1,5}$")  # GPU, and the end of iOS

_BRACKETS = {")": "(", "]": "[", "〕": "〔"}  # around an explanation; brackets of titles (《》, 「」) are ignored
_AS_IS = "²³™℠"  # compatibility forms that must not become "2" or "TM"
_JAMO = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x3164)}
_FILLERS = "\u115f\u1160"  # letters in Unicode, blank on screen


def _final(syllable: str) -> int:
    return CODAS.index(coda(syllable))


def _fold(text: str) -> str:
    """Return NFC text without marks and with basic forms of letters: full width, ㎏, é, Ⅲ -> kg, e, 3."""
    folded = []
    for character in unicodedata.normalize("NFC", text):
        if character.isascii() or is_syllable(character) or character in _AS_IS:
            folded.append(character)
        elif "Ⅰ" <= character <= "ⅿ":
            folded.append(str(int(unicodedata.numeric(character))))
        else:
            parts = unicodedata.normalize("NFKD", character)
            letters = (part for part in parts if part not in _FILLERS and unicodedata.category(part)[0] != "M")
            folded += [_JAMO.get(letter, letter) for letter in unicodedata.normalize("NFC", "".join(letters))]
    return "".join(folded)


@functools.cache
def _readings() -> dict[str, str]:
    """Return the readings of words, units and symbols in Hangul."""
    return {_fold(word): reading for word, reading in read_table("particles.tsv")}


def _kind(character: str) -> str:
    """Return "a" for a Latin letter, "0" for a digit, "가" for Hangul, "" for anything else."""
    if character.isascii():
        return "a" if character.isalpha() else "0" if character.isdigit() else ""
    return "가" if is_syllable(character) or character in _JAMO.values() else ""


def _look_up(text: str) -> str | None:
    """Return the reading of the longest table word that `text` ends with, or None."""
    readings = _readings()
    for length in range(min(len(text), max(map(len, readings))), 0, -1):
        word, before = text[-length:], text[-length - 1 : -length]
        if _kind(word[0]) and _kind(word[0]) == _kind(before):
            continue  # part of a longer word, as "kg" in "Akg"
        if "0" + word in readings and _kind(text[-length - 2 : -length].rstrip(" ")[-1:]) == "0":
            return readings["0" + word]
        reading = readings.get(word) or readings.get(word.lower())
        if reading:
            return reading
    return None


def _number_ending(number: str) -> str:
    """Return the last syllable of the Sino-Korean reading of a number: "1,000" -> 천."""
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", number):
        number = number.replace(",", "")
    number = number.rpartition(",")[2]
    zeros = len(number) - len(number.rstrip("0"))
    # Read digit by digit: decimals (3.10), codes (007), and numbers that are too large to have a name.
    if not zeros or "." in number or number[0] == "0" or zeros >= 4 * (len(_LARGE_UNITS) + 1):
        return _DIGITS[int(number[-1])]
    return _SMALL_UNITS[zeros - 1] if zeros < 4 else _LARGE_UNITS[zeros // 4 - 1]


def _read_number(text: str) -> int:
    """Return the final consonant of the number at the end of `text`."""
    before = text.rstrip(string.digits + ".,/⁄")
    parts = re.split("[/⁄]", text[len(before) :].lstrip(".,/⁄"))
    if unicodedata.category(before[-1:] or " ") == "Sc" and before[-1] in _readings():
        return _final(_readings()[before[-1]][-1])  # ₩1,000 is read 천 원
    # The numerator of a fraction is read last: 2/3 is 삼분의 이.
    number = parts[0] if len(parts) == 2 and parts[0][-1].isdigit() else parts[-1]
    return _final(_number_ending(number.strip(".,")))


def _read_latin(text: str) -> int:
    """Return the final consonant of the Latin letters at the end of `text`."""
    word = text[len(text.rstrip(string.ascii_letters)) :]
    lower = word[-12:].lower()
    if len(word) == 1 or _INITIALISM.search(word[-6:]) or not re.search("[aeiouy]", lower):
        return _LETTER_FINALS.get(word[-1].upper(), 0)
    return next((final for ending, final in _ENDINGS if ending.search(lower)), 0)


def _opening(text: str) -> int:
    """Return the position of the opening bracket for the closing one at the end of `text`, or -1."""
    closing = text[-1]
    opening, depth = _BRACKETS.get(closing), 0
    for place in range(len(text) - 1, -1, -1) if opening else ():
        depth += (text[place] == closing) - (text[place] == opening)
        if depth == 0:
            return place
    return -1


def final_consonant(word: str) -> int | None:
    """Return the index of the final consonant of `word` as it is read (0: none, 8: ㄹ), or None if it is unknown.

    Closing punctuation, quotes, spaces and emoji are ignored, and so are brackets at the end if the text before them
    can be read: "사과(apple)" ends like 사과.
    """
    left = [_fold(word)]
    while left:
        text = left.pop()
        while text:
            last = text[-1]
            if is_syllable(last):
                return _final(last)
            if reading := _look_up(text):
                return _final(reading[-1])
            if _kind(last) == "0":
                return _read_number(text)
            if _kind(last) == "a":
                return _read_latin(text)
            if unicodedata.category(last)[0] in "LN":
                break
            place = _opening(text)
            if place >= 0:
                left.append(text[place + 1 : -1])
            text = text[: place if place >= 0 else -1]
    return None


def particle(word: str, pair: str) -> str:
    """Return the form of `pair` (such as "을/를", in either order) that follows `word`.

    If the last sound of the word is unknown, return both forms: "을(를)", "(으)로".

    Raises:
        ValueError: `pair` is not a known particle pair.
    """
    reverse = "/".join(reversed(pair.split("/")))
    forms = _FORMS.get(pair) or _FORMS.get(reverse)
    if forms is None:
        raise ValueError(f"unknown particle {pair!r}; known: {', '.join(_PAIRS)}")
    after_consonant, after_vowel = forms
    final = final_consonant(word)
    if final is None:
        shared = after_consonant.removesuffix(after_vowel)
        return f"({shared}){after_vowel}" if shared != after_consonant else f"{after_consonant}({after_vowel})"
    if after_vowel.startswith("로") and final == _FINAL_RIEUL:
        return after_vowel
    return after_consonant if final else after_vowel


def attach(word: str, pair: str) -> str:
    """Return `word` followed by the fitting form of `pair`: attach("원", "은/는") is "원은"."""
    return word + particle(word, pair)


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
_PAIR = {form: pair for pair in ("은/는", "이/가", "을/를", "과/와", "으로/로", "이랑/랑") for form in pair.split("/")}
_SUFFIX = re.compile(
    rf"(들)?({'|'.join(sorted(_PAIR, key=len, reverse=True))})?"
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
    """Return `text` (NFC) with nouns replaced by their `names`, and their particles in the form that fits.

    `which` takes the number of nouns in the text and returns the indices of the nouns to replace.
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
    """Return the noun in `word` and its last particle, or `word` and "" if it has none that `drop_particles` drops."""
    if not word.endswith(_DROPPED):
        return word, ""
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
    return particle(name, _PAIR[form]) + suffix[len(form) :] if form else suffix
