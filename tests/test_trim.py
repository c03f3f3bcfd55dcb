"""Vocabularies cut to some texts: the four kinds of tokenizers, every class of model, the recipe, real weights."""

import json
import os
import re
import runpy
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.kobert_files import CORPUS
from helpers.tokenizer_families import FAMILIES
from helpers.tokenizer_kinds import KINDS, SPECIAL, as_fast, byte_fallback
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_models import saved
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoTokenizer

import koclip
from koclip import config
from koclip.config import ConfigError, TrimConfig
from koclip.data.texts import read_texts
from koclip.models.pretrained import load_image_side, load_text_encoder
from koclip.models.stock import layout_of, save_stock_model
from koclip.models.swap import swap_text_tower
from koclip.models.trim import REPORT, Source, _readme, trim
from koclip.text import tokenizers
from koclip.text.trim import FORMS, Vocabulary, changes, held_out, scripts_of

GIVEN = CORPUS[:6]
OTHERS = CORPUS[6:]
TOWERS = os.environ.get("KOCLIP_TOWERS")  # folder of pretrained towers
RECIPE = Path(__file__).parents[1] / "recipes" / "trim.py"


@cache
def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(KINDS[kind]())


def cut(before: Vocabulary, texts: list[str], num_pieces: int | None = None) -> tuple[list[int], Any]:
    kept = before.select(before.count(texts), [], scripts_of(texts), num_pieces)
    return kept, as_fast(Tokenizer.from_str(before.cut(kept)))


words = st.one_of(
    st.sampled_from([word for line in CORPUS for word in line.split()]),
    st.text(alphabet=sorted(set("".join(CORPUS))), max_size=6),
    st.text(max_size=3),
)
texts = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(given_texts=texts, other_texts=texts, form=st.sampled_from(FORMS), num_pieces=st.none() | st.integers(600, 700))
def test_texts_of_kept_pieces_keep_them(kind, given_texts, other_texts, form, num_pieces) -> None:
    before = vocabulary(kind)
    kept, after = cut(before, given_texts, num_pieces)
    new = {old: rank for rank, old in enumerate(kept)}
    assert len(after) == len(kept)
    assert sorted(after.get_vocab().values()) == list(range(len(kept)))
    originals = before.tokenizer
    for text in [unicodedata.normalize(form, text) for text in (*given_texts, *other_texts)]:
        ids = originals(text)["input_ids"]
        covered = set(ids) <= set(kept) and (kind != "WordPiece" or originals.unk_token_id not in ids)
        if covered or (num_pieces is None and text in {unicodedata.normalize(form, each) for each in given_texts}):
            assert after(text)["input_ids"] == [new[piece] for piece in ids]
    changed, same = changes(before, after, kept, other_texts)
    assert {change.text for change in changed}.isdisjoint(same)
    assert {*same, *(change.text for change in changed)} <= set(other_texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_smaller_and_loses_no_character(kind: str) -> None:
    before = vocabulary(kind)
    kept, after = cut(before, GIVEN)
    assert len(kept) < 0.9 * len(before)
    for text in (word for line in OTHERS for word in line.split() if scripts_of([word]) <= {"HANGUL"}):
        assert before.tokenizer.unk_token_id not in before.tokenizer(text)["input_ids"]
        assert after.unk_token_id not in after(text)["input_ids"], text
        if "BPE" in kind:
            assert after.decode(after(text)["input_ids"]).strip() == text
    changed, _ = changes(before, after, kept, OTHERS)
    assert changed


def test_the_score_of_an_unknown_character_stays() -> None:
    """Three frequent pieces beat an unknown character, whose score depends on the lowest score of the vocabulary."""
    pieces = [("<unk>", 0.0), ("bc", -9.0), ("de", -9.0), ("fg", -9.0), ("cdefg", -1.0), ("rare", -20.0)]
    before = Vocabulary(as_fast(Tokenizer(models.Unigram(pieces, unk_id=0))))
    kept, after = cut(before, ["bcdefg", "cdefg"])
    assert after.convert_ids_to_tokens(after("bcdefg")["input_ids"]) == ["bc", "de", "fg"]
    assert before.cut([piece for piece in kept if piece != 5]) != before.cut(kept)


def test_an_unknown_word_stays_unknown() -> None:
    """WordPiece takes `ab` first and fails. Without `ab` it would take `a` and `##bc`."""
    vocab = {piece: number for number, piece in enumerate(["<unk>", "<pad>", "a", "ab", "##bc", "x"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    before = Vocabulary(as_fast(tokenizer))
    assert before.tokenizer.tokenize("abc xbc") == ["<unk>", "x", "##bc"]
    _, after = cut(before, ["abc xbc"])
    assert after.tokenize("abc xbc") == ["<unk>", "x", "##bc"]


def trimmed(model: Path, target: Path, texts: list[str], **options: Any) -> dict[str, Any]:
    settings = TrimConfig(model=str(model), texts=["some.txt"], output_dir=str(target), **{"held_out": 0.0} | options)
    return trim(Source(str(model)), texts, settings)


def write_family(folder: Path, family: str) -> Path:
    folder.mkdir()
    FAMILIES[family].write(folder)
    kind = AutoConfig.from_pretrained(folder).model_type if (folder / "config.json").exists() else "bert"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    write_encoder(folder, kind, len(tokenizer) + 7, pad_token_id=tokenizer.pad_token_id)
    return folder


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"clip"}))
def test_a_text_encoder_of_every_family(family: str, tmp_path: Path) -> None:
    source, target = write_family(tmp_path / "source", family), tmp_path / "target"
    report = trimmed(source, target, GIVEN)
    before, after = (AutoModel.from_pretrained(folder).eval() for folder in (source, target))
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    assert type(after) is type(before)
    assert type(new) is type(old)
    assert after.config.vocab_size == len(new) == report["pieces"]["after"] < report["pieces"]["before"]
    assert report["bytes_of_weights"]["after"] < report["bytes_of_weights"]["before"]
    for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk"):
        assert getattr(new, f"{name}_token") == getattr(old, f"{name}_token")
    assert after.config.pad_token_id == new.pad_token_id
    for text in GIVEN:
        assert new.tokenize(text) == old.tokenize(text)
        hidden = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            for model, tokenizer in ((before, old), (after, new))
        ]
        assert torch.equal(*hidden)
    assert {file.name for file in target.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [*target.glob("*.model"), *target.glob("*.txt")]


def test_the_card_of_the_source_is_replaced(tmp_path: Path) -> None:
    """It describes another model. The licence's text stays."""
    source, target = write_family(tmp_path / "source", "bert"), tmp_path / "target"
    (source / "README.md").write_text(
        "---\nmodel-index: [{name: original}]\n---\nScores of the original", encoding="utf-8"
    )
    (source / "LICENSE.md").write_text("MIT", encoding="utf-8")
    report = trimmed(source, target, GIVEN)
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "original" not in card
    assert str(tmp_path) not in card
    for sizes in (report["pieces"], report["bytes"]):
        assert f"| {sizes['before']:,} | {sizes['after']:,} |" in card
    assert (target / "LICENSE.md").read_text(encoding="utf-8") == "MIT"
    assert "base_model: org/model\n" in _readme(report | {"model": "org/model"})


@pytest.mark.parametrize(
    "kind", ["CLIP", "ChineseCLIP", "AltCLIP", "MetaCLIP 2", "SigLIP", "SigLIP 2", "joint timm", "joint CLIP"]
)
def test_a_dual_encoder_keeps_its_image_side(kind: str, tmp_path: Path) -> None:
    source, target = saved(kind, tmp_path / "source"), tmp_path / "target"
    report = trimmed(source, target, GIVEN[:2])
    assert report["pieces"]["after"] < report["pieces"]["before"]
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1
    assert changed.pop().startswith("text_model.")
    first, second = koclip.load(source), koclip.load(target)
    assert type(first.model) is type(second.model)
    assert torch.equal(first.encode_texts(GIVEN[:2]), second.encode_texts(GIVEN[:2]))


WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {"tie_word_embeddings": False},
    "XLMRobertaForMaskedLM": {},
    "ModernBertForMaskedLM": {"global_attn_every_n_layers": 2},
    "DebertaV2ForMaskedLM": {"legacy": False},
    "ElectraForPreTraining": {"embedding_size": 24},
    "T5EncoderModel": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_output_layers_of_language_models_are_cut(name: str, tmp_path: Path) -> None:
    source, target, tokenizer = tmp_path / "source", tmp_path / "target", byte_fallback()
    ids = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    kind = getattr(transformers, name)
    sizes = {"vocab_size": len(tokenizer) + 5, "pad_token_id": 0, "max_position_embeddings": 80}
    options = LANGUAGE_MODELS[name] if name.startswith("T5") else WIDTH | LANGUAGE_MODELS[name]
    model = kind(kind.config_class(**sizes, **ids, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases too: rows in the wrong order would show
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    report = trimmed(source, target, GIVEN)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    old, new = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(target)
    kept = torch.tensor([old[piece] for piece in new.convert_ids_to_tokens(list(range(len(new))))])
    assert set(after) == set(before)
    for tensor_name, tensor in after.items():
        whole = before[tensor_name]
        assert torch.equal(tensor, whole if tensor.shape == whole.shape else whole[kept]), tensor_name
    loaded, info = kind.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert loaded.get_input_embeddings().weight.shape[0] == report["pieces"]["after"] < report["pieces"]["before"]


def test_the_end_token_of_the_first_clips_stays_the_largest_id(tmp_path: Path) -> None:
    """Their config.json has 2, and the text tower reads the token with the largest id."""
    source, target = saved("CLIP", tmp_path / "source"), tmp_path / "target"
    settings = json.loads((source / "config.json").read_text())
    settings["text_config"] |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    (source / "config.json").write_text(json.dumps(settings))
    trimmed(source, target, GIVEN[:2])
    text = AutoConfig.from_pretrained(target).text_config
    assert (text.bos_token_id, text.pad_token_id, text.eos_token_id) == (0, 1, 2)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == text.vocab_size - 1
    first, second = koclip.load(source), koclip.load(target)
    assert torch.equal(first.encode_texts(GIVEN[:2]), second.encode_texts(GIVEN[:2]))


def test_a_router_keeps_its_image_side(tmp_path: Path) -> None:
    """Its text encoder is in a folder, and the root has a copy of the tokenizer."""
    source, target, picture = tmp_path / "source", tmp_path / "target", Image.new("RGB", (40, 36), "red")
    clip, image_processor = load_image_side(str(write_source(tmp_path / "clip")))
    encoder = load_text_encoder(str(write_family(tmp_path / "encoder", "roberta")))
    model: Any = swap_text_tower(clip, encoder, pooling="mean")
    tokenizer = tokenizers.load(str(tmp_path / "encoder"), 40, encoder.config)
    kind: Any = layout_of(model).processor_class
    save_stock_model(source, model, kind(image_processor, tokenizer), model.state_dict())
    assert (source / "router_config.json").is_file()
    trimmed(source, target, GIVEN)
    first, second = koclip.load(source), koclip.load(target)
    assert torch.equal(first.encode_texts(GIVEN), second.encode_texts(GIVEN))
    assert torch.equal(first.encode_images([picture]), second.encode_images([picture]))
    assert second.model.config.text_config.vocab_size < first.model.config.text_config.vocab_size
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (source, target))
    assert (after.encode(GIVEN) == before.encode(GIVEN)).all()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizers"):
        trimmed(source, tmp_path / "other", GIVEN)


def test_weights_in_several_files(tmp_path: Path) -> None:
    source, target = write_family(tmp_path / "source", "roberta"), tmp_path / "target"
    AutoModel.from_pretrained(source).save_pretrained(source, max_shard_size="20KB")
    (source / "model.safetensors").unlink()
    assert len(list(source.glob("*.safetensors"))) > 2
    trimmed(source, target, GIVEN)
    assert {file.name for file in target.glob("model*")} == {file.name for file in source.glob("model*")}
    total = json.loads((target / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(parameter.nbytes for parameter in AutoModel.from_pretrained(target).parameters())


def test_a_sentence_transformers_model_keeps_its_other_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    encoder = write_family(tmp_path / "encoder", "xlm-roberta")
    modules = [Transformer(str(encoder)), Pooling(32, pooling_mode="mean"), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(source))
    trimmed(source, target, GIVEN)
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (source, target))
    assert (after.encode(GIVEN) == before.encode(GIVEN)).all()
    assert after.encode(GIVEN).shape == (len(GIVEN), 8)
    shutil.move(source / "2_Dense" / "model.safetensors", source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        trimmed(source, tmp_path / "other", GIVEN)
    assert not (tmp_path / "other").exists()


def recipe(*args: str) -> None:
    runpy.run_path(str(RECIPE))["main"](config.parse(TrimConfig, list(args)))


def test_the_recipe_reads_texts_and_writes_a_report(tmp_path: Path) -> None:
    pairs, lines = write_pairs(tmp_path / "pairs.parquet"), tmp_path / "lines.txt"
    lines.write_text("\n".join([*CORPUS, "", CORPUS[0]]), encoding="utf-8")
    source, target = tmp_path / "source", tmp_path / "target"
    byte_fallback().save_pretrained(source)
    write_encoder(source, "bert", len(byte_fallback()))
    words = ("--model", str(source), "--texts", str(pairs), str(lines), "--output_dir", str(target))
    recipe(*words, "--held_out", "0.5")
    report = json.loads((target / REPORT).read_text(encoding="utf-8"))
    everything = read_texts([str(pairs), str(lines)])
    assert len(everything) == len(set(everything)) == 24 * 4 + len(CORPUS)
    num_held_out = sum(held_out(text, 0.5) for text in everything)
    assert 0 < num_held_out < len(everything)
    facts = report["texts"]
    assert [facts[f"{group}, NFC"]["texts"] for group in ("given", "held_out")] == [
        len(everything) - num_held_out,
        num_held_out,
    ]
    assert facts["given, NFC"]["changed"] == facts["given, NFD"]["changed"] == 0
    changed = facts["held_out, NFC"]
    assert changed["changed"] == len(changed["examples"]) > 0
    assert changed["share"] == changed["changed"] / num_held_out
    for example in changed["examples"]:
        assert held_out(example["text"], 0.5)
        assert example["before"] != example["after"]
    assert report["embeddings_compared"] > 0
    recipe(*words, "--num_pieces", "320")  # an earlier result is replaced
    assert len(AutoTokenizer.from_pretrained(target)) <= 320
    recipe(*words, "--min_count", "3", "--held_out", "0")
    report = json.loads((target / REPORT).read_text(encoding="utf-8"))
    assert report["texts"]["given, NFC"]["changed"] > 0
    assert report["texts"]["held_out, NFC"]["texts"] == 0


def write_word_level(folder: Path) -> Path:
    vocab = {word: number for number, word in enumerate(SPECIAL + CORPUS[0].split())}
    as_fast(Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))).save_pretrained(folder)
    write_encoder(folder, "bert", len(vocab))
    return folder


def write_slow(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "개"]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    write_encoder(folder, "bert", 6)
    return folder


def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    source, texts = write_family(tmp_path / "source", "bert"), tmp_path / "texts.txt"
    texts.write_text("\n \n", encoding="utf-8")
    cases: dict[str, Callable[[], object]] = {
        "nowhere.txt": lambda: read_texts(["nowhere.txt"]),
        "nowhere.parquet": lambda: read_texts(["nowhere.parquet"]),
        "texts.txt have no text": lambda: read_texts([str(texts)]),
        "BertJapaneseTokenizer": lambda: Source(str(write_slow(tmp_path / "slow"))),
        "WordLevel": lambda: Source(str(write_word_level(tmp_path / "words"))),
        "no-such-model": lambda: Source("no-such-model/really"),
        "folders with a text encoder": lambda: Source(str(tmp_path / "empty")),
        "num_pieces: got 10": lambda: trimmed(source, tmp_path / "target", GIVEN, num_pieces=10),
        "held_out: got 0.999": lambda: trimmed(source, tmp_path / "target", GIVEN, held_out=0.999),
        "output_dir": lambda: trimmed(source, source, GIVEN),
    }
    (tmp_path / "empty").mkdir()
    before = {file: file.read_bytes() for file in source.iterdir()}
    for message, mistake in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    texts.write_bytes("고양이가 창가에 앉아 있다".encode("cp949"))
    with pytest.raises(ConfigError, match="encoding: cp949"):
        read_texts([str(texts)])
    assert read_texts([str(texts)], encoding="cp949") == ["고양이가 창가에 앉아 있다"]
    assert not (tmp_path / "target").exists()
    assert {file: file.read_bytes() for file in source.iterdir()} == before


def test_a_tokenizer_that_changes_kept_texts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Vocabulary.cut
    monkeypatch.setattr(
        Vocabulary, "cut", lambda self, kept: re.sub(r'"merges": \[\[.*?\]\]', '"merges": []', right(self, kept))
    )
    source = write_family(tmp_path / "source", "roberta")
    with pytest.raises(ConfigError, match="all of its pieces are kept"):
        trimmed(source, tmp_path / "target", GIVEN)
    assert not (tmp_path / "target").exists()


def test_a_trimmed_encoder_is_aligned_and_keeps_its_vocabulary(tmp_path: Path) -> None:
    source, encoder = write_source(tmp_path / "source"), tmp_path / "trimmed"
    pairs = write_pairs(tmp_path / "pairs.parquet")
    texts = read_texts([str(pairs)])
    report = trimmed(write_family(tmp_path / "encoder", "xlm-roberta"), encoder, texts)
    run = ("--model.text_encoder", str(encoder), "--output_dir", str(tmp_path / "run"))
    align(*arguments(source, pairs, *run))
    aligned = koclip.load(tmp_path / "run" / "model")
    assert aligned.model.config.text_config.vocab_size == report["pieces"]["after"]
    original = AutoTokenizer.from_pretrained(encoder)
    tokenizer: Any = aligned.processor.tokenizer
    assert [tokenizer.tokenize(text) for text in texts] == [original.tokenize(text) for text in texts]


@pytest.mark.slow
@pytest.mark.skipif(TOWERS is None, reason="KOCLIP_TOWERS names no folder of pretrained towers")
def test_a_real_multilingual_encoder_becomes_less_than_half_as_large(tmp_path: Path, shared_data: Path) -> None:
    """250,037 pieces of XLM-R, cut to Korean and English captions."""
    source = Path(str(TOWERS)) / "e5_small_multilingual"
    texts = read_texts([str(shared_data / "flickr8k_ko" / "val.parquet")])
    report = trimmed(source, tmp_path / "trimmed", texts, held_out=0.1)
    assert report["pieces"]["before"] == 250_037
    assert report["bytes"]["after"] < 0.45 * report["bytes"]["before"]
    assert [report["texts"][f"given, {form}"]["changed"] for form in FORMS] == [0, 0]
    assert report["texts"]["held_out, NFC"]["share"] < 0.15
    assert report["embeddings_compared"] == 64
