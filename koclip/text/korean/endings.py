"""Change the style of sentence ends: 해라체 (plain, 달린다), 해요체 (polite, 달려요), 합쇼체 (formal, 달립니다).

The word before a full stop, an exclamation or a question mark and the last word of a text are read as a stem and an
ending: of verbs and adjectives (-ㄴ다/-는다/-다, -아요/-어요, -ㅂ니다/-습니다), of the past and 있다 (-ㅆ다), or of the
copula (이다, 이에요/예요, 입니다). `assets/stress_endings.tsv` lists stems that the rules cannot recognize.

Unchanged: noun phrases; endings with more meaning than the style (-네요, -지요, -세요, -자, -ㄹ까); forms with two
readings (산다: 사다 or 살다) that give different results; the copula without 이 (소녀다), which looks like a dictionary
form (보다); and words of respect, such as 저 for 나 and 께서 for 이/가.
"""

import functools
import re
from typing import Literal, NamedTuple

from koclip.storage import read_table
from koclip.text.korean.hangul import coda, compose, letters, with_coda
from koclip.text.korean.particles import particle

Style = Literal["plain", "polite", "formal"]

_WORD = re.compile("[가-힣]+")
_STOPS = (".", "!", "?", "…", "。")
_BRIGHT = "ㅏㅑㅗ"  # vowels that take 아, all others 어
_CONTRACTED = {"ㅗ": "ㅘ", "ㅜ": "ㅝ", "ㅣ": "ㅕ", "ㅚ": "ㅙ"} | {vowel: vowel for vowel in "ㅏㅓㅐㅔㅕ"}
_EXPANDED = {"ㅘ": "ㅗ", "ㅝ": "ㅜ", "ㅕ": "ㅣ", "ㅙ": "ㅚ"}
_COPULA = {"plain": "이다", "formal": "입니다"}


class Predicate(NamedTuple):
    """A stem, and the facts that determine its forms."""

    stem: str  # of 이다: the noun
    kind: str  # v: verb, a: adjective or a word with the same forms, c: 이다
    infinitive: str = ""  # the -아/-어 form


def restyle(text: str, style: Style) -> str:
    """Return `text` with every recognized sentence end in `style`."""
    end = next((place for place in range(len(text), 0, -1) if text[place - 1].isalnum()), 0)
    restyled, last, before = "", 0, ""
    for word in _WORD.finditer(text):
        if word.end() == end or text[word.end() : word.end() + 1] in _STOPS:
            restyled += text[last : word.start()] + _restyle_word(word[0], style, before)
            last = word.end()
        before = word[0]
    return restyled + text[last:]


def _restyle_word(word: str, style: Style, before: str) -> str:
    now, readings = _read(word)
    if now == style:
        return word
    negated = before[:-1] if before.endswith("지") else ""
    if negated and [reading.stem for reading in readings] == ["않"]:  # has the forms of the negated word: 높지 않다
        kinds = {predicate.kind for predicate in _listed(negated)[1]} or {"v"}
        readings = [reading._replace(kind=kind) for reading in readings for kind in kinds]
    words = {_write(reading, style) for reading in readings}
    return words.pop() if len(words) == 1 else word


def _write(predicate: Predicate, style: Style) -> str:
    stem, kind, infinitive = predicate
    if kind == "c":
        return stem + (particle(stem, "이에요/예요") if style == "polite" else _COPULA[style])
    if style == "polite":
        return infinitive + "요"
    drops = coda(stem) in ("", "ㄹ")
    if style == "formal":
        return with_coda(stem, "ㅂ") + "니다" if drops else stem + "습니다"
    if kind == "a" or coda(stem) == "ㅆ":  # the past, 있다, 겠다
        return stem + "다"
    return with_coda(stem, "ㄴ") + "다" if drops else stem + "는다"


def _infinitive(stem: str) -> str:
    """Return the regular -아/-어 form: 가, 봐, 달려, 먹어, 올라, 써."""
    onset, vowel, final = letters(stem[-1])
    before = letters(stem[-2]) if len(stem) > 1 else ("", "", "")
    if final:
        return stem + ("아" if vowel in _BRIGHT and final != "ㅆ" else "어")
    if stem[-1] == "하":
        return stem[:-1] + "해"
    bright = before[1] != "" and before[1] in _BRIGHT
    if stem[-1] == "르" and before[1] and not before[2]:
        return with_coda(stem[:-1], "ㄹ") + ("라" if bright else "러")
    if vowel == "ㅡ":
        return stem[:-1] + compose(onset, "ㅏ" if bright else "ㅓ")
    return stem[:-1] + compose(onset, _CONTRACTED[vowel]) if vowel in _CONTRACTED else stem + "어"


class _Table(NamedTuple):
    whole: dict[str, list[tuple[str, str]]]  # stem -> kind and irregular infinitive of each reading
    ends: dict[str, list[tuple[str, str]]]  # the same for ends of stems
    stems_of: dict[str, list[str]]  # irregular infinitive or its end -> stems or ends of stems


@functools.cache
def _table() -> _Table:
    table = _Table({}, {}, {})
    for stem, kind, infinitive in read_table("stress_endings.tsv"):
        readings = table.ends if stem.startswith("-") else table.whole
        readings.setdefault(stem.lstrip("-"), []).append((kind, infinitive))
        if infinitive:
            table.stems_of.setdefault(infinitive, []).append(stem.lstrip("-"))
    return table


def _listed(stem: str) -> tuple[int, list[Predicate]]:
    """Return what the table lists (2: the stem, 1: its end, 0: nothing), and the readings of the stem."""
    entries, start = _table().whole.get(stem), 0
    rank = 2 if entries else 1
    while not entries and start < len(stem):
        entries, start = _table().ends.get(stem[start:]), start + 1
    if not entries:
        return 0, []
    prefix = stem[: start - 1] if rank == 1 else ""
    return rank, [
        Predicate(stem, kind, prefix + infinitive if infinitive else _infinitive(stem)) for kind, infinitive in entries
    ]


def _best(stems: dict[str, bool]) -> list[Predicate]:
    """Return the readings of the best listed stems; the values say whether a stem counts if it is not listed."""
    ranked = []
    for stem, free in stems.items():
        rank, readings = _listed(stem)
        ranked.append((rank, readings or ([Predicate(stem, "v", _infinitive(stem))] if free else [])))
    best = max((rank for rank, readings in ranked if readings), default=0)
    return [reading for rank, readings in ranked if rank == best for reading in readings]


def _read(word: str) -> tuple[Style, list[Predicate]]:
    """Return the style of a word and its likeliest readings; no readings if it is not a known form."""
    if any(reading.kind == "n" for reading in _listed(word)[1]):
        return "plain", []
    if word.endswith("니다") and coda(word[:-2] or "가") == "ㅂ":
        return "formal", _read_formal(word)
    if word.endswith("요"):
        return "polite", _read_polite(word[:-1])
    return "plain", _read_plain(word[:-1]) if word.endswith("다") else []


def _read_formal(word: str) -> list[Predicate]:
    body = word[:-2]
    if body.endswith("습") and len(body) > 1 and coda(body[:-1]) not in ("", "ㄹ"):
        return _best({body[:-1]: True})
    if body.endswith("입") and len(body) > 1 and not _listed(with_coda(body, ""))[0]:
        return [Predicate(body[:-1], "c")]
    return _best({with_coda(body, ""): True, with_coda(body, "ㄹ"): False})


def _read_plain(body: str) -> list[Predicate]:
    """Return the readings of the part before 다."""
    if not body:
        return []
    final = coda(body)
    if body.endswith("는") and len(body) > 1:
        stem = body[:-1]
        return [] if coda(stem) in ("", "ㄹ") else _verbs({stem: True})
    if final == "ㄴ":
        return _verbs({with_coda(body, ""): True, with_coda(body, "ㄹ"): False, body: False})
    if final or body.endswith("하"):  # an adjective, 있다, the past, or a verb's dictionary form
        return [reading._replace(kind="a") for reading in _best({body: True})]
    if body.endswith("이") and len(body) > 1 and not _listed(body)[0]:
        return [Predicate(body[:-1], "c")]
    return _best({body: False})


def _verbs(stems: dict[str, bool]) -> list[Predicate]:
    return [reading for reading in _best(stems) if reading.kind == "v"]


def _read_polite(form: str) -> list[Predicate]:
    """Return the readings of the part before 요: an infinitive, or a noun with 이에 or 예."""
    if len(form) > 2 and form.endswith("이에"):
        return [Predicate(form[:-2], "c")]
    if len(form) > 1 and form.endswith("예") and not coda(form[:-1]) and form != "아니예":
        return [Predicate(form[:-1], "c")]
    if not form or coda(form):
        return []
    onset, vowel, _ = letters(form[-1])
    stems = {form: False, form[:-1] + compose(onset, "ㅡ"): False}
    if form[-1] in "아어" and len(form) > 1:
        stems[form[:-1]] = True
    if form[-1] in "라러" and len(form) > 1 and coda(form[:-1]) == "ㄹ":
        stems[with_coda(form[:-1], "") + "르"] = True
    if vowel in _EXPANDED:
        stems[form[:-1] + compose(onset, _EXPANDED[vowel])] = True
    if form[-1] == "해":
        stems[form[:-1] + "하"] = True
    for start in range(len(form)):
        stems |= {form[:start] + stem: False for stem in _table().stems_of.get(form[start:], [])}
    # Keep only stems with this infinitive, to exclude readings such as 가아 or 뛰여.
    infinitives = {stem: {each.infinitive for each in _listed(stem)[1]} or {_infinitive(stem)} for stem in stems}
    fitting = {stem: free for stem, free in stems.items() if form in infinitives[stem]}
    return [reading for reading in _best(fitting) if reading.infinitive == form]
