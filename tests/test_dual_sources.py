"""Dual encoders of every class as sources of an alignment: their own text tower is kept and trained, or swapped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import ENGLISH, KOREAN, align, arguments
from dual_sources import OPEN_CLIP, SIGMOID, SOURCES, loss_of, named, write_sources
from peer_models import saved
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, pipeline

import koclip
from koclip.align.methods import adapt, text_encoder
from koclip.config import ConfigError, SwapConfig
from koclip.models.dual_encoder import DualEncoder
from koclip.models.open_clip import convert, stock_source
from koclip.models.pretrained import load_image_side
from koclip.models.stock import bias_of, save_stock_model
from koclip.publishing.formats.onnx import export
from koclip.publishing.formats.sentence_transformers import describe
from koclip.publishing.preflight import preflight
from koclip.text import tokenizers

PICTURES = [Image.effect_noise((40, 36), 90).convert("RGB"), Image.new("RGB", (36, 50), "red")]


def few(*quick: str) -> list[Any]:
    """Return every source; all but `quick` are tested by `make slow`."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in SOURCES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sources(tmp_path_factory.mktemp("sources"))
    for kind in OPEN_CLIP:
        convert(named(folder, kind), folder / kind)
    return folder


def kept(place: Path, kind: str, directory: Path) -> Path:
    """Save a source with its own text tower after no step."""
    source = stock_source(named(place, kind), directory.with_name("source"))
    config = SwapConfig(clip=source, text_encoder="same")
    clip, images = load_image_side(config.clip)
    encoder = text_encoder(config, clip)
    assert encoder is not None
    tokenizer = tokenizers.load(config.clip, 40, encoder.config, KOREAN[:1])
    model, processor = adapt(config, clip, encoder, images, tokenizer)
    dual_encoder = DualEncoder(model, processor, -10.0 if kind in SIGMOID else None)
    save_stock_model(directory, model, processor, dual_encoder.state_dict())
    return directory


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_after_no_step_is_the_source(kind: str, place: Path, tmp_path: Path) -> None:
    texts = [*KOREAN, *ENGLISH]
    source, same = (koclip.load(path) for path in (place / kind, kept(place, kind, tmp_path / "model")))
    assert type(same.model) is type(source.model)
    assert torch.equal(same.encode_texts(texts), source.encode_texts(texts))
    assert torch.equal(same.encode_images(PICTURES), source.encode_images(PICTURES))
    assert (same.scale, same.bias) == (source.scale, source.bias)
    scores = []
    for path in (place / kind, tmp_path / "model"):
        classify: Any = pipeline("zero-shot-image-classification", model=str(path))
        labels = [label.lower() for label in ENGLISH]
        answers = classify(PICTURES[0], candidate_labels=labels, hypothesis_template="{}")
        scores.append({answer["label"]: answer["score"] for answer in answers})
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("kind", "name", "value", "differs"),
    [
        ("CLIP", "eos_token_id", 3, True),
        ("CLIP", "eos_token_id", tokenizers.LEGACY_EOS_ID, False),  # as in OpenAI's config.json
        ("CLIP", "pad_token_id", 3, False),  # what comes after the end is never seen
        ("CLIP", "bos_token_id", 3, False),
        ("MetaCLIP 2", "eos_token_id", 3, True),
        ("ChineseCLIP", "pad_token_id", 3, True),
        ("ChineseCLIP", "eos_token_id", 3, False),
        ("AltCLIP", "pad_token_id", 3, True),  # positions are counted from it
        ("SigLIP 2", "pad_token_id", 3, False),  # padding is a token like any other
        ("SigLIP 2", "vocab_size", 3, True),
    ],
)
def test_only_ids_that_change_embeddings_must_agree(
    kind: str, name: str, value: int, differs: bool, place: Path
) -> None:
    encoder = koclip.load(place / kind)
    config: Any = encoder.model.config.text_config
    assert not tokenizers.differing_ids(encoder.processor.tokenizer, config)
    setattr(config, name, value)
    assert [name in problem for problem in tokenizers.differing_ids(encoder.processor.tokenizer, config)] == [
        True
    ] * differs


def test_naflex_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Siglip2Model"):
        load_image_side(str(saved("SigLIP 2 NaFlex", tmp_path / "model")))


def run(place: Path, kind: str, name: str, *args: str) -> Path:
    directory = place / "runs" / f"{kind} {name}"
    if not directory.exists():
        more = ("--output_dir", str(directory), *args)
        align(*arguments(named(place, kind), place / "pairs.parquet", *more))
    return directory / "model"


NEW_TEXT = ("--align.method", "frozen_image", "--model.text_width", "32", "--model.text_layers", "1")
METHODS = {
    "frozen_image": ("--align.method", "frozen_image"),
    "lora": ("--align.method", "lora"),
    "full": ("--align.method", "full", "--align.first_steps", "2"),
    "anchored": ("--align.method", "frozen_image", "--distill.anchor", "0.5"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_method_trains_the_text_tower_of_every_source(kind: str, method: str, place: Path) -> None:
    model = run(place, kind, method, "--model.text_encoder", "same", *METHODS[method], *loss_of(kind))
    before, after = (koclip.load(path) for path in (place / kind, model))
    assert type(after.model) is type(before.model)
    assert not torch.equal(after.encode_texts(KOREAN), before.encode_texts(KOREAN))
    images_stay = torch.equal(after.encode_images(PICTURES), before.encode_images(PICTURES))
    assert images_stay == (method != "full")
    if method != "full":
        assert (after.scale, after.bias) == (before.scale, before.bias)
    elif kind in SIGMOID:
        assert after.bias != before.bias


@pytest.mark.parametrize("kind", SOURCES)
def test_another_text_tower_leaves_the_image_space(kind: str, place: Path) -> None:
    model = run(place, kind, "swapped", *NEW_TEXT)
    before, after = (koclip.load(path) for path in (place / kind, model))
    assert torch.equal(after.encode_images(PICTURES), before.encode_images(PICTURES))
    assert after.scale == before.scale
    stock: Any = AutoModel.from_pretrained(model)
    assert bias_of(stock) == bias_of(before.model)


@pytest.mark.parametrize("kind", few("open_clip SigLIP"))
def test_every_source_teaches_another_text_tower(kind: str, place: Path) -> None:
    """Without images. The student's embeddings come nearer to the teacher's."""
    steps = ("--train.num_steps", "30", "--optim.lr", "3e-3", "--eval.sets", "[]")
    model = run(place, kind, "distilled", *NEW_TEXT, "--align.method", "distill", *steps)
    before, after = (koclip.load(path) for path in (place / kind, model))
    assert torch.equal(after.encode_images(PICTURES), before.encode_images(PICTURES))
    log = [json.loads(line)["loss"] for line in (model.parent / "metrics.jsonl").read_text().splitlines()]
    assert sum(log[-5:]) < 0.8 * sum(log[:5])


@pytest.mark.parametrize("kind", few("SigLIP 2"))
def test_what_was_trained_is_published(kind: str, place: Path) -> None:
    model = run(place, kind, "frozen_image", "--model.text_encoder", "same", *METHODS["frozen_image"], *loss_of(kind))
    problems = {check.name: check.problems for check in preflight(model)}
    assert len(problems) > 5
    assert [name for name in problems if problems[name]] == ["licence is stated"]  # there is no card yet
    export(model, model)  # raises if a graph differs
    describe(model)
    encoder, other = koclip.load(model), SentenceTransformer(str(model), device="cpu")
    for expected, result in (
        (encoder.encode_texts(KOREAN), other.encode(KOREAN, convert_to_tensor=True)),
        (encoder.encode_images(PICTURES), other.encode(PICTURES, convert_to_tensor=True)),
    ):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
