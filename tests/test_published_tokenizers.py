"""Every family's tokenizer in a published directory, read by a program that has never heard of koclip."""

import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.kobert_files import CORPUS
from helpers.tokenizer_families import FAMILIES, LENGTH, strings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    PreTrainedTokenizerBase,
)

import koclip
from koclip.models.stock import save_stock_model
from koclip.text import tokenizers
from koclip.text.normalize import normalize


def dirty(texts: list[str]) -> list[str]:
    """Return texts with what nobody sees, special tokens, odd spaces and other forms in the middle of them."""
    rng = random.Random(1)
    unseen = [*"\u3164\ufeff\u200b\u00ad\u200e\u2060\u202d\uffa0\x00\x7f\x9f\u180e\u2069", "\u200b\ufeff"]
    special = ["[SEP]", "[cls]", "</s>", "<s>", "<pad>", "<MASK>", "<unk>", "<|endoftext|>", "<|startoftext|>", "[PAD]"]
    hidden = ["[S\u200bEP]", "<|end\u00adoftext|>", "<\ufeff/s>", "<<s>/s>", "[[SEP]SEP]"]
    spaces = ["\u00a0", "\u3000", "\n", "\t", "  ", "\u2028", "\x1f", "\x85", " "]
    soiled = []
    for text in texts:
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(text) + 1)
            part = rng.choice(rng.choice([unseen, unseen, special, hidden, spaces]))
            text = text[:place] + part + text[place:]
        soiled.append(unicodedata.normalize("NFD", text) if rng.random() < 0.5 else text)
    return [*soiled, "\ufeff", "\u200d \u200b", "</s>", "<|endoftext|>" * 3, "\u3164", "\ufe0f\u115f"]


class Published(NamedTuple):
    original: PreTrainedTokenizerBase  # by the class that its repository names
    trained: PreTrainedTokenizerBase  # what koclip trains with
    folder: Path  # the published model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    by_family = {}
    for name, family in FAMILIES.items():
        source, run, folder = (tmp_path_factory.mktemp(f"{name}-{what}") for what in ("source", "run", "model"))
        family.write(source)
        tokenizers.load(str(source), LENGTH, family.config, CORPUS).save_pretrained(run)  # as a run keeps it
        trained = tokenizers.load(str(run), LENGTH, family.config, CORPUS)
        trained(["길다 " * 40, "짧다"], truncation=True, padding="max_length", max_length=8)  # leaves state behind
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        text = sizes | {"vocab_size": len(trained), "pad_token_id": trained.pad_token_id}
        vision = sizes | {"image_size": 16, "patch_size": 16}
        model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        processor = ChineseCLIPProcessor(
            image_processor=ChineseCLIPImageProcessor(crop_size={"height": 16, "width": 16}), tokenizer=trained
        )
        save_stock_model(folder, model, processor, model.state_dict())
        by_family[name] = Published(AutoTokenizer.from_pretrained(source), trained, folder)
    return by_family


STRANGER = """
import json, sys
sys.modules["koclip"] = sys.modules["sentencepiece"] = None  # importing them raises ImportError
from transformers import AutoProcessor, AutoTokenizer
asked, answer = json.load(sys.stdin), {}
for name, folder in asked["folders"].items():
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    answer[name] = {
        "ids": {form: [tokenizer(texts)["input_ids"], processor(text=texts)["input_ids"]]
                for form, texts in asked["texts"].items()},
        "processor": type(processor).__name__, "inputs": tokenizer.model_input_names,
        "special": tokenizer.special_tokens_map,
        "extra": tokenizer.extra_special_tokens, "length": tokenizer.model_max_length,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side], "state": [
            tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation],
    }
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    composed = strings()
    decomposed = [unicodedata.normalize("NFD", text) for text in composed]
    return {"NFC": composed, "NFD": decomposed, "dirty": dirty(composed)}


@pytest.fixture(scope="module")
def read(published, texts) -> dict[str, dict]:
    asked = {"folders": {name: str(tokenizer.folder) for name, tokenizer in published.items()}, "texts": texts}
    ran = subprocess.run(
        [sys.executable, "-c", STRANGER], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_strings_are_worth_asking_for(texts) -> None:
    assert len(set(texts["NFC"])) > 950
    assert sum(composed != decomposed for composed, decomposed in zip(texts["NFC"], texts["NFD"], strict=True)) > 900
    assert len(texts["dirty"]) > 1_000
    assert all(normalize(text) == normalize(normalize(text)) for text in texts["dirty"])
    assert sum(unicodedata.normalize("NFC", text) != normalize(text) for text in texts["dirty"]) > 990
    assert all(any(character in text for text in texts["NFC"]) for character in "가é校ガ🇰7U")


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_the_same_before_and_after_publishing(name, published, texts, read) -> None:
    expected = published[name].original(texts["NFC"])["input_ids"]
    unknown = published[name].original.unk_token_id
    assert sum(unknown not in ids[1:-1] for ids in expected) > 250  # unknown tokens hide differences
    assert published[name].trained(texts["NFC"])["input_ids"] == expected
    assert published[name].trained(texts["NFD"])["input_ids"] == expected
    for form in ("NFC", "NFD"):
        assert read[name]["ids"][form] == [expected, expected]  # by the tokenizer, by the processor


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_callers_get_the_ids_of_clean_text(name, published, texts, read) -> None:
    """What nobody sees and special tokens in a text would end it early, shift positions or be unknown."""
    expected = published[name].trained([normalize(text) for text in texts["dirty"]])["input_ids"]
    special = set(published[name].trained.all_special_ids) - {published[name].trained.unk_token_id}
    assert all(special.isdisjoint(ids[1:-1]) for ids in expected)
    assert published[name].trained(texts["dirty"])["input_ids"] == expected
    assert read[name]["ids"]["dirty"] == [expected, expected]


PARTS = st.one_of(
    st.sampled_from(
        [*"\u3164\ufeff\u200b\u00ad\u200d\ufe0f\x00 \n[]<>|/", "[SEP]", "</s>", "<|endoftext|>", "SEP", "한글"]
    ),
    st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cn"]),
)


@pytest.mark.parametrize("name", ["klue", "xlm-roberta", "roberta", "kobert", "clip"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PARTS, max_size=30))
def test_any_text_has_the_ids_of_the_clean_text(name, published, parts) -> None:
    text = "".join(parts)
    assert published[name].trained(text)["input_ids"] == published[name].trained(normalize(text))["input_ids"]


def test_stock_callers_get_koclips_embeddings_of_texts_that_are_not_clean(published) -> None:
    texts = dirty(strings(40))
    for name in ("clip", "klue"):
        encoder = koclip.load(published[name].folder, "cpu")
        stock = AutoProcessor.from_pretrained(published[name].folder)
        inputs = stock(text=texts, padding=True, truncation=True, return_tensors="pt")
        wanted = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            features = AutoModel.from_pretrained(published[name].folder).get_text_features(**wanted).pooler_output
        cosines = torch.nn.functional.cosine_similarity(features, encoder.encode_texts(texts))
        torch.testing.assert_close(cosines, torch.ones(len(texts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_some_families_compose_by_themselves(name, published, texts) -> None:
    from koclip.text.cleaning import cleaning

    composed, decomposed = (published[name].original(texts[form])["input_ids"] for form in ("NFC", "NFD"))
    assert (composed == decomposed) == FAMILIES[name].composes
    cleaning(published[name].original)
    assert published[name].original(texts["NFD"])["input_ids"] == decomposed  # `cleaning` works on a copy
    assert cleaning(published[name].trained) is published[name].trained


@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_are_those_of_javascript_too(name, published) -> None:
    """transformers.js reads the same tokenizer.json: no flags, no escapes that only Oniguruma has."""
    steps = json.loads((published[name].folder / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
    patterns = [step["pattern"]["Regex"] for step in steps["normalizers"][:7] if "Regex" in step.get("pattern", {})]
    assert len(patterns) == 5
    assert not [pattern for pattern in patterns if re.search(r"\(\?[^:]|\\[A-Za-z]", pattern)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_class_gave_is_kept(name, published, read) -> None:
    original, answer = published[name].original, read[name]
    assert answer["processor"] == "CLIPProcessor"
    assert answer["inputs"] == original.model_input_names
    assert answer["special"] == original.special_tokens_map
    assert answer["extra"] == original.extra_special_tokens
    assert answer["length"] == LENGTH
    assert answer["sides"] == ["right", "right"]
    assert answer["state"] == [None, None]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_4_knows_every_name_in_the_files(name, published) -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in published[name].folder.glob("*.json")}
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["processor_class"] == "CLIPProcessor"  # the other one knows BERT's tokenizer alone there
    assert "extra_special_tokens" not in settings  # a dictionary in transformers 4
    assert settings.get("additional_special_tokens", []) == published[name].original.extra_special_tokens
    foreign = ("TokenizersBackend", "auto_map", "ChineseCLIPProcessor", "ChineseCLIPImageProcessor")
    assert [file for file, text in files.items() if any(word in text for word in foreign)] == []
    processor = json.loads(files["processor_config.json"])
    assert processor["processor_class"] == "CLIPProcessor"
    assert processor["image_processor"]["image_processor_type"] == "CLIPImageProcessor"
    assert json.loads(files["preprocessor_config.json"])["image_processor_type"] == "CLIPImageProcessor"


def test_some_family_has_additional_special_tokens(published) -> None:
    assert published["camembert"].original.extra_special_tokens == ["<s>", "</s>"]
