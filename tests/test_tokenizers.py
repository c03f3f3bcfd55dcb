"""koclip.text.tokenizers: a byte-level BPE that cannot ruin a CLIP, and the checks on any tokenizer."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from koclip.config import ConfigError
from koclip.text import tokenizers


def fuzz(count: int = 1_000) -> list[str]:
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x800), (0x800, 0xD800), (0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x110000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 8))) for _ in range(count)]


def test_no_text_has_an_end_token_inside(tokenizer) -> None:
    for text, ids in zip(fuzz(), tokenizer(fuzz())["input_ids"], strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1, text
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id


def test_special_tokens_have_the_highest_ids_and_the_size_is_kept(tokenizer, captions) -> None:
    assert isinstance(tokenizer, CLIPTokenizer)
    assert 514 < len(tokenizer) <= 600
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 16
    assert len(tokenizers.train_bpe(captions * 3, vocab_size=530, max_tokens=16)) == 530


def test_training_is_deterministic(tokenizer, captions) -> None:
    again = tokenizers.train_bpe(iter(captions), vocab_size=600, max_tokens=16)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_decomposed_text_has_the_ids_of_composed_text(tokenizer, captions) -> None:
    for caption in captions:
        assert tokenizer(unicodedata.normalize("NFD", caption)).input_ids == tokenizer(caption).input_ids


def test_stock_classes_reload_it_with_the_same_ids(tokenizer, captions, tmp_path) -> None:
    tokenizers.encode(tokenizer, captions, padding=True, return_tensors="pt")  # leaves padding and truncation behind
    tokenizers.forget_call_state(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (stored["padding"], stored["truncation"]) == (None, None)
    texts = fuzz(300) + captions
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)):
        assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert loaded.padding_side == "right"


def test_encode_cuts_and_pads_to_the_longest(tokenizer) -> None:
    encoded = tokenizers.encode(tokenizer, ["원", "원 " * 40], padding=True, return_tensors="pt")
    assert encoded["input_ids"].shape == (2, 16)
    assert encoded["input_ids"][1, -1] == tokenizer.eos_token_id
    assert encoded["attention_mask"][0].tolist().count(1) == len(tokenizer("원").input_ids)
    assert tokenizers.encode(tokenizer, ["원"], padding=True, return_tensors="pt")["input_ids"].shape[1] < 16


def test_load_checks_and_sets_the_length(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.load(str(tmp_path), 7).model_max_length == 7
    with pytest.raises(ConfigError, match=r"tokenizer.path: no tokenizer can be loaded from 'nowhere/at-all'"):
        tokenizers.load("nowhere/at-all", 7)


def test_check_refuses_an_incomplete_byte_base(tokenizer) -> None:
    vocab = {token: index for index, token in enumerate(t for t in tokenizer.get_vocab() if t != "©</w>")}
    broken = CLIPTokenizer(vocab=vocab, merges=[])
    with pytest.raises(ConfigError, match=r"exactly one end token"):
        tokenizers.check(broken, "broken")


def test_check_refuses_other_defects(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    left = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    with pytest.raises(ConfigError, match="pads on the left"):
        tokenizers.check(left, "left")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"has no (eos|pad)_token_id"):
        tokenizers.check(bare, "bare")
