"""The first SigLIP's tokenizer as a fast one: the ids of transformers' own slow class, character by character."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers.kobert_files import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, SiglipTextConfig, SiglipTokenizer

from koclip.config import ConfigError
from koclip.text import siglip, tokenizers
from koclip.text.normalize import normalize

SPECIAL = {"pad_id": 0, "eos_id": 1, "bos_id": -1, "unk_id": 2}
# Of C4's vocabulary, "<" is unknown. In others it is a piece.
KINDS: dict[str, dict[str, Any]] = {
    "without <": {},
    "with <": {"required_chars": "<>/"},
    "another map": {"normalization_rule_name": "nfkc_cf"},
    "accents": {"required_chars": "éñü\u0301가각"},
}


def write(folder: Path, options: dict[str, Any], **tokenizer_options: Any) -> SiglipTokenizer:
    """Train a model on Korean and English, and save it as transformers does. Return the slow tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(train(options))
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), **tokenizer_options)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(options: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    lines = [line.replace("<", "").replace(">", "") for line in CORPUS] * 3
    sizes = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
    }
    everything = sizes | SPECIAL | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **everything)
    return model.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Return the slow and the fast tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("siglip")
    slow = {kind: write(folder / kind, options) for kind, options in KINDS.items()}
    slow["cased"] = write(folder / "cased", {}, do_lower_case=False, model_max_length=16)
    return {kind: (tokenizer, siglip.load(str(folder / kind))) for kind, tokenizer in slow.items()}


def ids(tokenizer: Any, texts: list[str], length: int = 64) -> list[list[int]]:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]


TEXTS = [
    *CORPUS,
    *(
        "",
        " ",
        "▁",
        "!!!",
        " a",
        "a  ",
        "\t두\u3000줄\n끝 ",
        "▁밑줄▁▁두 개",
        "A_b-C",
        "\uff1cunk\uff1e",
        "\uff1c/s\uff1e ﹤pad﹥",
        "ΑΣ Σ ΑΣΑ",
    ),
    *(
        "ÀÉ e\u0301 ½ ㎏ Ⅷ ﬁ",
        "고양이",
        unicodedata.normalize("NFD", "고양이 사진"),
        "🙂👨‍👩‍👧 이모지",
        "İstanbul ẞ",
        "\u200b\ufeff\u00ad",
    ),
    "긴 글 " * 100,
]


@pytest.mark.parametrize("kind", [*KINDS, "cased"])
def test_ids_are_those_of_the_slow_class(kind: str, pairs: Any) -> None:
    slow, fast = pairs[kind]
    assert ids(fast, TEXTS) == ids(slow, TEXTS)
    assert [fast.pad_token_id, fast.eos_token_id, fast.unk_token_id] == [1, 1, 2]
    assert fast.model_max_length == slow.model_max_length
    assert fast.get_vocab() == slow.get_vocab()
    assert list(fast("가나")) == ["input_ids"]


@pytest.mark.parametrize(
    "kind", ["without <", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("with <", "cased"))]
)
def test_every_character(kind: str, pairs: Any) -> None:
    """In a word and alone; those that composition (NFC) changes are changed first, as koclip does."""
    slow, fast = pairs[kind]
    codes = [*range(0x20, 0x3400), *range(0x3400, 0xD800, 97), *range(0xE000, 0x20000, 13)]
    texts = [unicodedata.normalize("NFC", f"나{chr(code)}무A {chr(code)}") for code in codes]
    rows = zip(texts, ids(fast, texts, 16), ids(slow, texts, 16), strict=True)
    assert [text for text, row, other in rows if row != other] == []


LETTERS = st.sampled_from(
    [*"가각나 무사진ABcdéßΣ\u03c3 12.,!?<>/_-▁'\t\u3000\u00a0½㎏ﬁ\uff1c\uff1e🙂", "<un", "unk", "k>"]
)


@given(st.lists(LETTERS | st.characters(codec="utf-8", max_codepoint=0x1FFFF), max_size=30).map("".join))
@settings(max_examples=200)
def test_random_texts(pairs: Any, text: str) -> None:
    text = normalize(text)
    wrong = [kind for kind, (slow, fast) in pairs.items() if ids(fast, [text], 40) != ids(slow, [text], 40)]
    assert wrong == []


def test_it_is_loaded_for_training_and_published(pairs: Any, tmp_path: Path) -> None:
    """The published tokenizer cleans texts, and has the ids of the slow class for clean texts."""
    slow = write(tmp_path / "slow", {})
    tower = SiglipTextConfig(vocab_size=len(slow), max_position_embeddings=64)
    tokenizers.load(str(tmp_path / "slow"), 64, tower, CORPUS[:3]).save_pretrained(tmp_path / "fast")
    published = AutoTokenizer.from_pretrained(tmp_path / "fast")
    texts = [normalize(text) for text in TEXTS]
    assert ids(published, texts) == ids(slow, texts)
    assert ids(published, ["A  CAT\u200b [SEP] </s>"]) == ids(slow, ["a cat"])
    saved = json.loads((tmp_path / "fast" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert not (tmp_path / "fast" / "spiece.model").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "bpe"}, "model_type"),
        ({"byte_fallback": True, "vocab_size": 600}, "byte_fallback"),
        ({"remove_extra_whitespaces": False}, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["a▁b"]}, "several words"),
        ({"eos_piece": "<end>"}, "</s>"),
    ],
)
def test_a_model_with_other_ids_is_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = train(options)
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    with pytest.raises(ConfigError, match=named):
        siglip.load(str(tmp_path))


def test_other_tokenizers_are_left_alone(pairs: Any, tmp_path: Path) -> None:
    pairs["with <"][1].save_pretrained(tmp_path)
    assert siglip.load(str(tmp_path)) is None
