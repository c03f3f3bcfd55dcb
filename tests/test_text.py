"""koclip.text: captions, particles, prompts."""

import random
import unicodedata

import pytest

from koclip.text.classes import fill
from koclip.text.korean.particles import attach, final_consonant, particle
from koclip.text.normalize import clean_captions, normalize, usable


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (unicodedata.normalize("NFD", "고양이 café"), "고양이 café"),
        ("  두 마리\t개\n\u3000달린다\u00a0", "두 마리 개 달린다"),
        ("a\x00b\x1fc\x7fd\x85e", "ab cd e"),
        ("lone \ud83d surrogate", "lone surrogate"),
        ("소\u200b프트\u00ad하이픈\ufeff \u2060끝\u200e", "소프트하이픈 끝"),
        ("ㅋㅋㅋ 👨\u200d👩\u200d👧 ❤\ufe0f", "ㅋㅋㅋ 👨\u200d👩\u200d👧 ❤\ufe0f"),
        ("\u3164", ""),
        ("", ""),
    ],
)
def test_normalize(text: str, clean: str) -> None:
    assert normalize(text) == clean


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|STARTOFTEXT|>", "[CLS]", "[mask]", "</s>", "<pad>", "<eos>"])
def test_special_tokens_are_taken_out(special: str) -> None:
    assert normalize(f"개{special}와 고양이 {special}") == "개 와 고양이"


@pytest.mark.parametrize(
    "text",
    [
        "<|start<|endoftext|>oftext|>",
        "<|endof\x00text|>",
        "<|endof\u200btext|>",
        "[C[SEP]LS]",
        "<\ud800/s>",
    ],
)
def test_special_tokens_do_not_come_back(text: str) -> None:
    clean = normalize(text).lower()
    assert not any(special in clean for special in ("<|endoftext|>", "<|startoftext|>", "[cls]", "[sep]", "</s>"))


def test_normalize_is_idempotent_and_nfc() -> None:
    rng = random.Random(0)
    alphabet = "가각힣ㄱㅏ\u1100\u1161\u11a8é\u0301 \t\x00\u200b<|endoftext|>[SEP]\ud800abc\u3164"
    for _ in range(2_000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(30)))
        clean = normalize(text)
        assert normalize(clean) == clean
        assert unicodedata.is_normalized("NFC", clean)


def test_what_is_no_caption_leaves_its_place_empty() -> None:
    assert clean_captions(" 개 ") == ["개"]
    cell = ["개", None, "", " ", float("nan"), 3, "nan", "NaN", "None", "null", "고양이"]
    assert clean_captions(cell) == ["개", *[""] * 9, "고양이"]
    assert usable(clean_captions(cell)) == ["개", "고양이"]
    for cell in (None, "", float("nan"), 3, {"a": "b"}, [], b"bytes", "nan", ["", None], [["개"]]):
        assert clean_captions(cell) == []
    assert clean_captions("nan bread") == ["nan bread"]


@pytest.mark.parametrize(
    ("word", "pair", "result"),
    [
        ("원", "은/는", "원은"),
        ("고양이", "은/는", "고양이는"),
        ("별", "이/가", "별이"),
        ("사과", "가/이", "사과가"),
        ("책", "을/를", "책을"),
        ("개", "와/과", "개와"),
        ("별", "으로/로", "별로"),
        ("집", "으로/로", "집으로"),
        ("차", "으로/로", "차로"),
        ("3", "을/를", "3을"),
        ("1", "으로/로", "1로"),
        ("2", "이/가", "2가"),
        ("'별'", "이/가", "'별'이"),
        (unicodedata.normalize("NFD", "강"), "이/가", unicodedata.normalize("NFD", "강") + "이"),
        ("漢字", "을/를", "漢字을(를)"),
        ("漢字", "으로/로", "漢字(으)로"),
    ],
)
def test_particles(word: str, pair: str, result: str) -> None:
    assert attach(word, pair) == result


def test_unknown_particles_and_final_consonants() -> None:
    with pytest.raises(ValueError, match=r"'x/y'.*을/를"):
        particle("개", "x/y")
    assert final_consonant("별") == 8
    assert final_consonant("") is None
    assert final_consonant("ㅋㅋ") is None


def test_prompts() -> None:
    assert fill("{}의 사진", "개") == "개의 사진"
    assert fill("{}{이/가} 있는 {} 사진{을/를}", "말") == "말이 있는 말 사진을"
    assert fill("{}{이/가}", "새") == "새가"
    with pytest.raises(ValueError, match="'사진'"):
        fill("사진", "개")
    with pytest.raises(ValueError, match="abc"):
        fill("{}{abc}", "개")
