"""The numbers of a card are of the very weights that are published, wherever they lay when they were measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs_to_publish import swapped
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_tokenizer

from koclip.config import ConfigError, PublishConfig
from koclip.encoders import load
from koclip.encoders.transformers import TransformersEncoder
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model
from koclip.publishing.card import render, write_card
from koclip.publishing.card_inputs import gather
from koclip.publishing.formats.int8 import read
from koclip.publishing.formats.sentence_transformers import describe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def settings(run: Path, **changes: object) -> PublishConfig:
    cards = str(ROOT / "data_cards")
    return PublishConfig(model=str(run / "model"), repo_id="org/name", data_cards=cards, **changes)  # type: ignore[arg-type]


def card_of(run: Path, **changes: object) -> str:
    cfg = settings(run, **changes)
    return str(render(cfg, gather(cfg), year=2026))


def say(run: Path, **values: object) -> None:
    """Put values into results.json; None takes one out."""
    file = run / "results.json"
    results = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps({key: value for key, value in results.items() if value is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "org/another-clip",
        "runs/another/model",
        "../another/model",
        "open_clip:ViT-B-32@openai",
        "sentence_transformers:a+b",
        "mclip:a+b",
        "/nowhere/model",
        "",
    ],
)
def test_the_numbers_of_another_model_are_refused(run, trained, name):
    """Whatever it is called: by a name that is no path here, and by that of the model itself."""
    for named in (name or str(run / "model"), "org/name"):
        say(run, model=named, fingerprint="0" * 32)
        with pytest.raises(ConfigError, match=r"results: fingerprint: got '0{32}', expected .*koclip evaluate"):
            card_of(run)


def test_numbers_that_do_not_say_of_which_weights_they_are_are_refused(run):
    say(run, fingerprint=None)
    command = "koclip evaluate --model .*/copy/model --output_dir runs/measured"
    with pytest.raises(ConfigError, match=f"results.json, fingerprint: got None, .*{command}"):
        card_of(run)


@pytest.mark.parametrize("name", ["org/name", "runs/mine/model", "/elsewhere/run/model"])
def test_the_numbers_of_these_weights_are_taken_whatever_they_were_called(run, name):
    say(run, model=name)
    assert "R@10: 45.7 %" in card_of(run)


def test_a_run_that_was_copied_or_moved_still_publishes(run, tmp_path):
    assert "R@10: 45.7 %" in card_of(run)  # its original is there, too
    moved = run.rename(tmp_path / "moved")
    assert "R@10: 45.7 %" in card_of(moved)
    (tmp_path / "measured").mkdir()
    elsewhere = (moved / "results.json").rename(tmp_path / "measured" / "results.json")
    assert "R@10: 45.7 %" in card_of(moved, results=str(elsewhere))


def shift(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = sorted(name for name, weight in weights.items() if weight.dim() > 1)[-1]
    weights[name][0, 0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def edit(name: str, *keys: str, value: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        values = json.loads((model / name).read_text(encoding="utf-8"))
        inner = values
        for key in keys[:-1]:
            inner = inner[key]
        assert inner[keys[-1]] != value
        inner[keys[-1]] = value
        (model / name).write_text(json.dumps(values), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    "change",
    [
        shift,
        edit("processor_config.json", "image_processor", "image_mean", value=[0.5, 0.5, 0.5]),
        edit("processor_config.json", "image_processor", "resample", value=2),
        edit("tokenizer.json", "model", "merges", value=[]),
        edit("tokenizer_config.json", "model_max_length", value=8),
        edit("config.json", "vision_config", "layer_norm_eps", value=0.1),
    ],
)
def test_a_model_that_has_changed_since_it_was_measured_is_refused(run, change):
    change(run / "model")
    with pytest.raises(ConfigError, match=r"results: fingerprint: got "):
        card_of(run)


def test_what_publishing_adds_changes_no_fingerprint(run):
    cfg = settings(run)
    describe(run / "model")
    write_card(cfg, gather(cfg))
    (run / "model" / "onnx").mkdir()
    (run / "model" / "onnx" / "text_model.onnx").write_bytes(b"a graph")
    assert "R@10: 45.7 %" in card_of(run)


@pytest.mark.parametrize("kind", ["clip", "swapped", "joint"])
def test_a_model_has_one_fingerprint_in_memory_and_on_disk(kind, tmp_path):
    if kind == "swapped":
        model = swapped(tmp_path / "run", "org/clip", "klue/roberta-small")
        encoder = load(model, "cpu")
        loaded = encoder.model, encoder.processor
    else:
        torch.manual_seed(0)
        sizes = {"preset": "timm:test_vit", "image_size": 32} if kind == "joint" else {}
        loaded = from_scratch(tiny_config(**sizes), tiny_tokenizer())
        model = tmp_path / "model"
        save_stock_model(model, *loaded, loaded[0].state_dict())
    measured = load(str(model), "cpu").fingerprint()
    assert TransformersEncoder(*loaded).fingerprint() == measured
    loaded[0].save_pretrained(tmp_path / "again", max_shard_size="50kB")  # in several files
    loaded[1].save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert load(str(tmp_path / "again"), "cpu").fingerprint() == measured


def test_what_int8_loses_is_told_of_graphs_of_these_weights_alone(run):
    folder = run / "model" / "onnx"
    folder.mkdir()
    results = {"model": "org/name", "fingerprint": "0" * 32, "data": {}, "metrics": {}, "environment": {}}
    for content in (results, {**results, "fingerprint": None}):
        (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"onnx/results\.json, fingerprint: got .*--onnx int8"):
            card_of(run)
    shutil.rmtree(folder)
    assert read(run / "model", "any") is None
