"""koclip.text.tokenizers: a byte-level BPE that cannot ruin a CLIP, and the checks on any tokenizer."""

import json
import random
import unicodedata
import warnings
from pathlib import Path

import pytest
from helpers.kobert_files import CORPUS
from helpers.kobert_files import write as write_kobert
from helpers.tokenizer_families import BERT, FAMILIES, KLUE, settle, wordpiece
from tokenizers.normalizers import NFD
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from koclip.config import ConfigError
from koclip.text import tokenizers

JAPANESE = ["猫が窓辺に座って外を見ている", "赤い自転車が木のそばにある"]


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
    tokenizers.forget_call_state(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.load(str(tmp_path), 7).model_max_length == 7
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: .*'nowhere/at-all'"):
        tokenizers.load("nowhere/at-all", 7)


def test_check_refuses_an_incomplete_byte_base(tokenizer) -> None:
    vocab = {token: index for index, token in enumerate(t for t in tokenizer.get_vocab() if t != "©</w>")}
    broken = CLIPTokenizer(vocab=vocab, merges=[])
    with pytest.raises(ConfigError, match=r"exactly one end token"):
        tokenizers.check(broken, "broken")


def test_check_refuses_other_defects(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    left = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    with pytest.raises(ConfigError, match="padding_side='right'"):
        tokenizers.check(left, "left")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"has no (eos|pad)_token_id"):
        tokenizers.check(bare, "bare")


def refusal(folder: Path, config: PreTrainedConfig | None, probes: list[str] | None = None) -> str:
    """Return the message with which `load` refuses a tokenizer, unless the message lacks the place or the fix."""
    with pytest.raises(ConfigError, match=str(folder)) as raised:
        tokenizers.load(str(folder), 40, config, probes)
    return str(raised.value)


def klue(folder: Path, **settings: object) -> Path:
    wordpiece(folder, KLUE, "roberta", **{"tokenizer_class": "BertTokenizer"} | settings)
    return folder


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_tokenizer_loads_in_silence(name, tmp_path) -> None:
    FAMILIES[name].write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tokenizers.load(str(tmp_path), 40, FAMILIES[name].config)
    assert loaded.model_max_length == 40
    assert len(tokenizers.encode(loaded, ["긴 글 " * 99])["input_ids"][0]) == 40
    tokenizers.check(loaded, name, FAMILIES[name].config, CORPUS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 0}, "its pad token has id 1, the roberta encoder's config.json says pad_token_id 0"),
        ({"pad_token_id": None}, "its pad token has id 1, the roberta encoder's config.json says pad_token_id None"),
        ({"bos_token_id": 5}, "its cls token has id 0, the roberta encoder's config.json says bos_token_id 5"),
        ({"eos_token_id": 5}, "its sep token has id 2, the roberta encoder's config.json says eos_token_id 5"),
        ({"vocab_size": 100}, "the roberta encoder's vocabulary has 100 entries"),
    ],
)
def test_ids_that_are_not_the_encoders_are_refused(config, message, tmp_path) -> None:
    assert message in refusal(klue(tmp_path), RobertaConfig(**{"vocab_size": 500} | config))


def test_a_vocabulary_as_large_as_the_encoders_fits(tmp_path) -> None:
    size = len(AutoTokenizer.from_pretrained(klue(tmp_path)))
    tokenizers.load(str(tmp_path), 40, RobertaConfig(vocab_size=size))
    assert f"ids up to {size - 1}" in refusal(tmp_path, RobertaConfig(vocab_size=size - 1))


def test_an_uncased_bert_is_refused_for_hangul(tmp_path) -> None:
    wordpiece(tmp_path, BERT, "bert", do_lower_case=True)
    message = refusal(tmp_path, BertConfig())
    assert "splits Hangul syllables into jamo: '고양이가' becomes 'ᄀ ᅩ ᄋ ᅣ ᆼ ᄋ ᅵ ᄀ ᅡ'" in message
    assert "strip_accents, which do_lower_case turns on" in message
    rewrite(tmp_path / "tokenizer_config.json", strip_accents=False)  # as the message says
    tokenizers.load(str(tmp_path), 40, BertConfig(), ["ㅋㅋㅋ 고양이"])
    rewrite(tmp_path / "tokenizer_config.json", strip_accents=None)
    tokenizers.load(str(tmp_path), 40, BertConfig(), ["a red circle"])  # nothing is wrong with it in English


def test_a_clip_tokenizer_is_tried_on_probes_too(tokenizer) -> None:
    apart = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    for config in (None, CLIPTextConfig()):
        tokenizers.check(apart, "apart", config, ["고양이"])
    apart.backend_tokenizer.normalizer = NFD()
    tokenizers.check(apart, "apart")
    with pytest.raises(ConfigError, match="'고양이'"):
        tokenizers.check(apart, "apart", CLIPTextConfig(), ["고양이"])


@pytest.mark.parametrize("with_json", [False, True])
def test_a_missing_tokenizer_class_is_named(with_json, tmp_path) -> None:
    if with_json:
        AutoTokenizer.from_pretrained(klue(tmp_path)).save_pretrained(tmp_path)
    klue(tmp_path, tokenizer_class=None)
    english = ["a red bicycle by the sea", "two dogs are running on the beach"] * 9
    for probes in (None, [*CORPUS[:5], *english]):
        message = refusal(tmp_path, RobertaConfig(), probes)
        assert "loses 100% of the HANGUL letters" in message
        assert "becomes ['<s>', " in message
        assert " RobertaTokenizer " in message
        assert 'tokenizer_class in its tokenizer_config.json (a KLUE-RoBERTa needs "BertTokenizer")' in message
    klue(tmp_path)  # as the message says
    tokenizers.load(str(tmp_path), 40, RobertaConfig(), [*CORPUS[:5], *english])


def test_a_missing_vocabulary_and_an_unconverted_kobert_are_named(tmp_path) -> None:
    klue(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    message = refusal(tmp_path, RobertaConfig())
    assert " BertTokenizer with 5 tokens" in message
    assert "koclip.text.kobert.convert" in message
    write_kobert(tmp_path / "kobert", "monologg")
    settle(tmp_path / "kobert", "bert", do_lower_case=False)
    assert "convert it with koclip.text.kobert.convert" in refusal(tmp_path / "kobert", BertConfig(pad_token_id=1))


def test_a_tokenizer_is_tried_in_the_language_of_the_data(tmp_path) -> None:
    special = list(BERT)
    tokens = special + sorted({mark + character for text in JAPANESE for character in text for mark in ("", "##")})
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    settle(tmp_path, "bert", do_lower_case=False)
    loaded = tokenizers.load(str(tmp_path), 40, BertConfig(), JAPANESE)
    apart = unicodedata.normalize("NFD", JAPANESE[0])
    assert apart != JAPANESE[0]
    assert loaded(apart)["input_ids"] == loaded(JAPANESE[0])["input_ids"]
    assert "loses 100% of the HANGUL letters of 2 captions, expected at most 50%" in refusal(tmp_path, BertConfig())
    tokenizers.load(str(tmp_path), 40, BertConfig(), [])  # tried before
    tokenizers.load(str(tmp_path), 40, BertConfig(), [*JAPANESE * 4, "猫 고양이"])  # few letters of the captions
    (tmp_path / "korean").mkdir()
    assert "of the CJK letters of 2 captions" in refusal(klue(tmp_path / "korean"), RobertaConfig(), JAPANESE)


def test_the_wrong_side_is_refused_wherever_it_is_written(tmp_path) -> None:
    klue(tmp_path, padding_side="left")
    assert "pads on the left; text towers need padding_side='right'" in refusal(tmp_path, RobertaConfig())
    klue(tmp_path, truncation_side="left")
    assert "cuts long texts on the left" in refusal(tmp_path, RobertaConfig())
    once = AutoTokenizer.from_pretrained(klue(tmp_path))
    once(["고양이", "강아지가"], padding=True, padding_side="left")
    assert once.padding_side == "right"
    once.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'direction': 'left'"):
        assert '"padding" and "truncation" to null in tokenizer.json' in refusal(tmp_path, RobertaConfig())
    rewrite(tmp_path / "tokenizer.json", padding=None)  # as the message says
    assert tokenizers.load(str(tmp_path), 40, RobertaConfig()).padding_side == "right"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_earlier_call_left_is_named_and_dropped(name, tmp_path) -> None:
    family, long = FAMILIES[name], "고양이가 창가에 앉아 밖을 보고 있다 " * 3
    family.write(tmp_path)
    expected = tokenizers.load(str(tmp_path), 40, family.config)(long)["input_ids"]
    leaking = AutoTokenizer.from_pretrained(tmp_path)
    leaking(["고양이"], padding="max_length", truncation=True, max_length=6)
    leaking.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"{'truncation': {'max_length': 6.*'padding': {") as warned:
        loaded = tokenizers.load(str(tmp_path), 40, family.config)
    assert len(warned) == 1
    assert str(tmp_path) in str(warned[0].message)
    assert loaded.backend_tokenizer.encode(long).ids == expected
    assert len(expected) > 6
    loaded.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (stored["padding"], stored["truncation"]) == (None, None)


def test_a_slow_tokenizer_is_refused(tmp_path) -> None:
    settle(tmp_path, "t5", tokenizer_class="ByT5Tokenizer")
    for config in (None, BertConfig()):
        assert "is a ByT5Tokenizer" in refusal(tmp_path, config)


def test_texts_begin_with_the_cls_token(tmp_path) -> None:
    AutoTokenizer.from_pretrained(klue(tmp_path)).save_pretrained(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = tokenizers.load(str(tmp_path), 40, RobertaConfig())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 2)])
    tokenizer.save_pretrained(tmp_path)
    assert "expected the cls token (0)" in refusal(tmp_path, RobertaConfig())


@pytest.mark.parametrize("token", ["pad", "cls"])
def test_an_encoders_tokenizer_needs_its_special_tokens(token, tmp_path) -> None:
    AutoTokenizer.from_pretrained(klue(tmp_path)).save_pretrained(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **{f"{token}_token": None})
    assert f"has no {token}_token_id, which a text encoder needs" in refusal(tmp_path, RobertaConfig())


def test_a_kept_tokenizer_is_the_same_when_it_is_read_again(tmp_path) -> None:
    first = tokenizers.load(str(klue(tmp_path)), 40, RobertaConfig())
    first.save_pretrained(tmp_path / "kept")
    again = tokenizers.load(str(tmp_path / "kept"), 40, RobertaConfig())
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert again.special_tokens_map == first.special_tokens_map
    assert again.model_input_names == first.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
