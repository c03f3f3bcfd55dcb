"""koclip.text.korean.stress: hand-checked tables in tests/stress, and properties on random strings."""

import collections
import functools
import random
import re
import sys
import time
import unicodedata
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from koclip.data.formats import scenes
from koclip.storage import read_table
from koclip.text.korean.endings import restyle
from koclip.text.korean.hangul import compose, keystrokes, letters, neighbours, spell, typed
from koclip.text.korean.particles import replace_nouns, split
from koclip.text.korean.stress import STRESSES

TABLES = Path(__file__).parent / "stress"
SEEDED = {"moved_spaces", "typo", "two_typos", "english_nouns"}
STYLES = ("plain", "polite", "formal")
FLOORS = {"no_particles": 80, "romanized": 130}  # of all others: 25
HANGUL = [chr(code) for code in (*range(0x3131, 0x318F), *range(0xAC00, 0xD7A4))]


def rows(name: str) -> list[list[str]]:
    lines = (TABLES / f"{name}.tsv").read_text(encoding="utf-8").split("\n")
    return [line.split("\t") for line in lines if line and not line.startswith("# ")]


@functools.cache
def random_texts(count: int) -> list[str]:
    """Texts of all code points, lone surrogates among them, of jamo, and of what the functions look for."""
    rng = random.Random(0)
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    jamo = "".join(map(chr, (*range(0x1100, 0x1200), *range(0x3131, 0x318F)))) + "가각힣 "
    familiar = " \t\n\u3000.!?…。,'\"()-/aZé\u0301\ud83d\udc36\u200d0139\uff11٣漢か🐶\u115f\u1160\u302e\uffa1\ua960"
    familiar += "개공입은을를이가에서으로와과의는다요니습예에어아하해했있없않지들두세닭앉읽싫밟산"
    words = [word for name in (*STRESSES, "endings") for row in rows(name) for word in row[0].split()]
    alphabets: list[list[str]] = [everything, list(jamo), list(familiar), HANGUL, words, [f"{word} " for word in words]]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(10))) for _ in range(count)]


def has_hangul(text: str) -> bool:
    return not set(unicodedata.normalize("NFC", text)).isdisjoint(HANGUL)


@pytest.mark.parametrize("name", STRESSES)
def test_hand_checked_cases(name: str) -> None:
    cases = rows(name)
    assert len(cases) >= FLOORS.get(name, 25)
    assert all(len(case) == 2 + (name in SEEDED) for case in cases)
    assert len({tuple(case[:-1]) for case in cases}) == len(cases)
    wrong = []
    for text, *seed, expected in cases:
        for number in map(int, seed or ("0", "1")):  # where nothing is drawn, every seed gives the same
            result = STRESSES[name](text, number)
            shown = " ".join(f"{ord(letter):04X}" for letter in result) if name == "nfd" else result
            if shown != expected:
                wrong.append((text, number, expected, shown))
    assert not wrong, f"(text, seed, expected, got): {wrong}"


def test_tables_hold_changed_and_unchanged_texts() -> None:
    for name in STRESSES:
        cases = rows(name)
        assert sum(case[0] != case[-1] for case in cases) >= 15, name
        if name not in ("nfd", "romanized", "wrong_input_mode"):
            assert any(case[0] == case[-1] for case in cases), name


def test_endings_in_all_directions() -> None:
    cases = rows("endings")
    assert len(cases) >= 120
    wrong = []
    for case in cases:
        for text in case:
            results = [restyle(text, style) for style in STYLES]  # type: ignore[arg-type]
            if results != case:
                wrong.append((text, case, results))
    assert not wrong, f"(text, expected, got): {wrong}"


@pytest.mark.parametrize("name", STRESSES)
def test_any_string(name: str) -> None:
    stress, changed = STRESSES[name], 0
    for number, text in enumerate(random_texts(10_000)):
        result = stress(text, number)
        if not has_hangul(text):
            assert result == text, repr(text)
            continue
        for form in ("NFC", "NFD"):  # one of which is the text itself, most often: the same seed gives the same
            assert stress(unicodedata.normalize(form, text), number) == result, repr(text)
        assert unicodedata.normalize("NFD" if name == "nfd" else "NFC", result) == result, repr(text)
        changed += result != text
    assert changed > 100


@pytest.mark.parametrize("text", ["", " ", "a dog", "é", "e\u0301", "漢字 かな 🐶", "3 / 4", "\ud83d", "\u1100", "ﾡ"])
def test_text_without_hangul_stays(text: str) -> None:
    for stress in STRESSES.values():
        assert stress(text, 0) == text == stress(stress(text, 1), 2)


@pytest.mark.parametrize("name", STRESSES)
def test_seeds(name: str) -> None:
    text = "빨간 모자를 쓴 소녀와 강아지가 공원에서 공을 던지며 놀고 있다."
    results = {STRESSES[name](text, seed) for seed in range(20)}
    assert (len(results) > 5) == (name in SEEDED)
    assert (len(results) == 1) == (name not in SEEDED)


@pytest.mark.parametrize("name", sorted(set(STRESSES) - {"typo", "two_typos", "moved_spaces", "english_nouns", "jamo"}))
def test_twice_is_once(name: str) -> None:
    for case in rows(name):
        once = STRESSES[name](case[0], 0)
        assert STRESSES[name](once, 0) == once, case[0]


def test_long_texts_take_no_long_time() -> None:
    for unit in ("가", " ", "가 ", "가.", "다.", "가!", "아이가 입은 옷을 본다. ", "\u1100", "들", " 은", "aㅏ", "..."):
        text = "개" + unit * (10_000 // len(unit)) + "다"
        for name, stress in STRESSES.items():
            start = time.thread_time()
            stress(text, 0)
            assert time.thread_time() - start < 2, (unit, name)  # seconds; measured: below 0.1


@pytest.mark.parametrize(("name", "slips"), [("typo", 1), ("two_typos", 2)])
def test_slips_are_on_neighbouring_keys(name: str, slips: int) -> None:
    hit = collections.Counter[str]()
    texts = ["고양이가 의자에 앉아 있다", "쌀과 얘기", "뛰는 개", "책", "값비싼 옷"]
    for number, text in enumerate(texts * 200):
        before, after = keystrokes(text), keystrokes(STRESSES[name](text, number))
        assert len(before) == len(after)
        places = [place for place, keys in enumerate(zip(before, after, strict=True)) if keys[0] != keys[1]]
        assert len(places) == slips
        for place in places:
            assert after[place] in neighbours(before[place])
            hit[before[place]] += 1
    assert set(hit) == set(keystrokes("".join(texts))) - {" "}


def test_neighbours_touch_each_other() -> None:
    table = {
        **{"q": "wa", "a": "qwsz", "z": "asx", "g": "tyfhvb", "p": "ol", "l": "opk", "m": "jkn", "r": "etdf"},
        **{"Q": "Wa", "R": "ETdf", "P": "Ol", "O": "Pikl", "s": "weadzx", "T": "Rygf"},
    }
    for key, near in table.items():
        assert sorted(neighbours(key)) == sorted(near), key
    keys = "qwertyuiopasdfghjklzxcvbnm"
    for key in keys:
        assert key not in neighbours(key)
        assert all(key in neighbours(near) for near in neighbours(key)), key
    assert sum(len(neighbours(key)) for key in keys) == 2 * (9 + 8 + 6 + 2 * (9 + 7))  # in rows, and between them


def test_typed_reads_what_keystrokes_write() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        word = "".join(rng.choices(HANGUL[94:], k=rng.randrange(1, 6)))
        assert typed(keystrokes(word)) == word
        assert "".join(compose(*letters(syllable)) for syllable in word) == word
        assert all("ㄱ" <= letter <= "ㅣ" for letter in spell(word))
    for keys, text in [
        *(("rkr", "각"), ("rkrk", "가가"), ("rkrt", "갃"), ("rkrtk", "각사"), ("rkrr", "각ㄱ"), ("rR", "ㄱㄲ")),
        *(("hk", "ㅘ"), ("rhkl", "과ㅣ"), ("dkE", "아ㄸ"), ("dkEk", "아따"), ("dkT", "았"), ("dkTk", "아싸")),
        *(("rt", "ㄱㅅ"), ("fkfqt", "랇ㅅ"), ("1rk!", "1가!"), ("kk", "ㅏㅏ"), ("ark", "ㅁ가"), ("Ark", "ㅁ가")),
    ]:
        assert typed(keys) == text, keys


def test_no_space_is_lost_or_made_by_moving() -> None:
    for number, text in enumerate(["빨간 모자를 쓴 소녀와 개", "a 개, 고양이. 두 마리", "나무  위의\t새가 난다"] * 30):
        moved = STRESSES["moved_spaces"](text, number)
        assert moved != text
        assert moved.replace(" ", "") == text.replace(" ", "")
        assert moved.count(" ") == text.count(" ")


@pytest.mark.parametrize(
    ("word", "following", "expected"),
    [
        ("공원에서는", "", ("공원에서", "는")),
        ("공원에서", "", ("공원", "에서")),
        ("입을", "벌린", ("입", "을")),
        ("입을", "때", ("입을", "")),
        ("는", "", ("는", "")),
        ("3의", "", ("3", "의")),
        ("고양이", "", ("고양이", "")),
    ],
)
def test_split(word: str, following: str, expected: tuple[str, str]) -> None:
    assert split(word, following) == expected


def test_tables_of_words() -> None:
    for name, columns, floor in (
        ("stress_endings.tsv", 3, 600),
        ("stress_particles.tsv", 2, 550),
        ("stress_romanization.tsv", 2, 70),
        ("stress_loanwords.tsv", 2, 160),
        ("stress_english.tsv", 2, 150),
    ):
        table = read_table(name)
        assert len(table) >= floor, name
        assert all(len(row) == columns and row[0] and row == [cell.strip() for cell in row] for row in table), name
        assert len(set(map(tuple, table))) == len(table), name
    assert {kind for _, kind, _ in read_table("stress_endings.tsv")} == {"v", "a", "n"}
    assert {kind for _, kind in read_table("stress_particles.tsv")} == {"word", "stem", "both", "noun"}


@pytest.mark.parametrize("name", ["loanwords", "english_nouns"])
def test_every_noun_of_a_table_is_found(name: str) -> None:
    for noun, replaced in read_table({"loanwords": "stress_loanwords.tsv"}.get(name, "stress_english.tsv")):
        for form in ("", "에서", "도", "들의"):
            assert STRESSES[name](noun + form, 0) == replaced + form


# Each holds a word that is a listed noun in another sentence, and none here.
OTHER_WORDS = """
회색 별 세 개 / 별이 네 개 있다 / 공 한 개가 있다 / 사과 두 개를 든 손님 / 열두 개의 초 / 스무 개
3 개 / 1,000 개 / 몇 개 / 여러 개의 초 / 수십 개 / 한두 개 / 서너 개 / 백여 개 / 몇몇 개의 초
이십 개 / 두 개들이 봉투 / 주사 한 방 / 나무로 만든 탁상 / 먼 거리에서 본 / 가게 한다 / 앞으로 가면 보인다
시장이 연설한다 / 사과를 받는다 / 모자가 손잡고 걷는다 / 불을 켠다 / 도로 넣는다 / 팔 것들 / 눈이 내린다
배를 깎는다 / 말을 건다 / 다리를 건넌다 / 밤을 굽는다 / 차를 마신다 / 풀을 바른다 / 벌을 받는다
병에 걸린다 / 별로 크지 않다 / 테니스 코트 / 의사를 밝힌다 / 신사에서 빈다 / 나눠 주자 / 빨리 사자
"""


@pytest.mark.parametrize("name", ["loanwords", "english_nouns"])
@pytest.mark.parametrize("text", re.split(r" / |\n", OTHER_WORDS.strip()))
def test_a_word_of_another_meaning_is_left_alone(name: str, text: str) -> None:
    words = [word for word in re.findall(r"[가-힣]+", text) if word not in ("별이", "별", "공", "손님", "초", "회색")]
    rewritten = [STRESSES[name](text, seed) for seed in range(10)]
    assert all(word in again for word in words for again in rewritten), rewritten


def reviewed_captions(request: pytest.FixtureRequest, name: str) -> list[str]:
    """150 captions of the built-in scenes or of Flickr8k, chosen by their hash."""
    if name == "scenes":
        texts = [text for index in range(2_000) for text in scenes.captions(scenes.scene("test", 0, index))["ko"]]
    else:
        file = request.getfixturevalue("shared_data") / "flickr8k_ko" / "train.parquet"
        column = pq.read_table(file, columns=["captions_ko"])["captions_ko"]
        texts = [text for captions in column.to_pylist() for text in captions]
    return sorted(set(texts), key=lambda text: sha256(text.encode()).digest())[:150]


# Hashes of rewrites that a person read, none of them wrong: every known noun replaced, the particles dropped, and each
# style of speech. Whoever changes a list or a rule reads the captions that it rewrites, and enters the new hash.
REVIEWED = {"scenes": "418eeab7391d81d7", "flickr8k": "71bdcd5856ede7a3"}


@pytest.mark.parametrize("name", REVIEWED)
def test_rewrites_are_those_that_were_read(name: str, request: pytest.FixtureRequest) -> None:
    captions = reviewed_captions(request, name)
    tables = [dict(read_table(f"stress_{table}.tsv")) for table in ("loanwords", "english")]
    rewrites = [functools.partial(replace_nouns, names=table, which=range) for table in tables]
    rewrites += [functools.partial(STRESSES[style], seed=0) for style in ("no_particles", *STYLES)]
    rewritten = [rewrite(text) for text in captions for rewrite in rewrites]
    assert len(captions) == 150
    assert sha256("\n".join(rewritten).encode()).hexdigest()[:16] == REVIEWED[name]
