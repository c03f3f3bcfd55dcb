"""koclip.text.korean.particles and named slots: a hand-checked table, and random labels."""

import random
import re
import sys
import unicodedata
from importlib import resources
from pathlib import Path

import pytest

from koclip.text.classes import fill
from koclip.text.korean.particles import _PAIRS, attach, final_consonant, particle

CASES = [
    line.split("\t")
    for line in (Path(__file__).parent / "particles.tsv").read_text(encoding="utf-8").split("\n")
    if line and not line.startswith("# ")
]


def random_labels(count: int) -> list[str]:
    """Labels of all planes' printable characters, half of them next to what particles must read or skip."""
    rng = random.Random(0)
    printable = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isprintable()]
    familiar = "가각갈힣ㄱㅏ\u1100\u1161\u11a8019,./%₩$²()[]'\" azAZkgm&+é\u0301\ufe0f\u200dⅢ①㎏漢か🍎\uff21\uff11"
    draws = (rng.choice((printable, familiar)) for _ in range(count))
    return ["".join(rng.choices(alphabet, k=rng.randrange(12))) for alphabet in draws]


def written(pair: str) -> tuple[str, str, str]:
    """Return both forms of a pair and its written convention."""
    first, second = pair.split("/")
    shared = first.removesuffix(second)
    return first, second, f"({shared}){second}" if shared != first else f"{first}({second})"


def test_hand_checked_cases() -> None:
    assert len(CASES) > 500
    assert all(len(case) == 3 for case in CASES)
    assert len({(word, pair) for word, pair, _ in CASES}) == len(CASES)
    wrong = [(form, attach(word, pair)) for word, pair, form in CASES if attach(word, pair) != form]
    assert not wrong, f"(expected, got): {wrong}"
    assert {pair for _, pair, _ in CASES} == set(_PAIRS)


def test_nfd_reads_like_nfc() -> None:
    for word in [word for word, _, _ in CASES] + random_labels(2_000):
        forms = {final_consonant(unicodedata.normalize(form, word)) for form in ("NFC", "NFD")}
        assert len(forms) == 1, f"{word!r}: {forms}"


def test_random_labels_take_one_of_the_forms() -> None:
    rng = random.Random(1)
    for label in random_labels(10_000):
        pair = rng.choice(_PAIRS)
        result = attach(label, pair)
        assert result.startswith(label)
        assert result.removeprefix(label) in written(pair), (label, pair, result)


def test_long_and_nested_labels() -> None:
    assert attach("(" * 500 + "책" + ")" * 500, "은/는").endswith("은")
    assert attach("漢(" * 500 + "책" + ")" * 500, "은/는").endswith("은")
    assert final_consonant("9" * 5_000) == 0
    assert final_consonant("1" + "0" * 5_000) == final_consonant("0")
    assert final_consonant("a" * 5_000 + "!" * 5_000) == 0
    assert final_consonant("\ud83d") is None


@pytest.mark.parametrize("pair", _PAIRS)
def test_pairs_work_in_either_order(pair: str) -> None:
    first, second, convention = written(pair)
    for word, form in (("책", first), ("사과", second), ("漢", convention)):
        assert particle(word, pair) == particle(word, f"{second}/{first}") == form


@pytest.mark.parametrize("pair", ["", "은", "은/가", "은/는/은", "을/를 ", "/"])
def test_unknown_pairs(pair: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(pair))}.*은/는"):
        particle("책", pair)


def test_table_of_readings() -> None:
    text = resources.files("koclip").joinpath("assets/particles.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.split("\n") if line and not line.startswith("# ")]
    words = [word for word, _ in lines]
    assert len(words) == len(set(words)) >= 150
    for word, reading in lines:
        assert re.fullmatch("[가-힣]+", reading), f"{word}: {reading}"
        # Every line is reached: a word reads like its reading.
        assert final_consonant(word) == final_consonant(reading), word


def test_named_slots() -> None:
    assert fill("{label:을/를} 든 사람", "사과") == "사과를 든 사람"
    assert fill("{:이/가} 있는 {label} 사진", "책") == "책이 있는 책 사진"
    assert fill("{who:이/가} {label:을/를} 든 {place}", "GPU", who="학생", place="집") == "학생이 GPU를 든 집"
    assert fill("{label:을/를}", "사과(apple)") == "사과(apple)를"
    assert fill("큰 {label} 하나{이/가}", "{x}") == "큰 {x} 하나가"
    assert fill("{label:이/가} 있는 사진", label="말") == "말이 있는 사진"
    # Only the label decides, not what stands before it.
    assert fill("사진 속 {label:은/는}", "漢字") == "사진 속 漢字은(는)"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("사진", r"'사진'.*\{\}, \{label\}"),
        ("{who}의 사진", r"'\{who\}의 사진'"),
        ("{label:을/은}", r"'\{label:을/은\}'.*'을/은'"),
        ("{} {color}", r"'\{color\}': .*'color'.* label, who$"),
        ("{} {color:을/를}", r"'\{color:을/를\}': .*'color:을/를'.* label, who$"),
    ],
)
def test_wrong_slots(template: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        fill(template, "사과", who="아이")
