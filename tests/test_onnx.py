"""ONNX graphs compute the model's embeddings, for any number of pictures and any length of text."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
import transformers
from peer_models import KINDS, WIDTH, clip, draw, joint, joint_processor, saved
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

import koclip
from koclip.config import ConfigError, RunError
from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model
from koclip.publishing.formats import onnx
from koclip.publishing.formats.onnx import MOST, export
from koclip.text import tokenizers


def published(folder: Path) -> Path:
    dual_encoder = tiny_dual_encoder()
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    save_stock_model(folder / "model", dual_encoder.model, processor, dual_encoder.state_dict())
    return folder / "model"


class Exported(NamedTuple):
    """A model in `folder / "model"`, with its graphs in `folder / "onnx"`."""

    folder: Path
    parities: dict[str, onnx.Parity]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that exports a model of a kind, once."""

    @functools.cache
    def export_once(kind: str) -> Exported:
        folder = tmp_path_factory.mktemp("exported")
        directory = folder / "model"
        directory = saved(kind, directory) if kind in KINDS else ends_a_text(kind, directory)
        return Exported(folder, export(directory, folder))

    return export_once


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "joint ViT", "joint timm"])
def test_graphs_equal_the_model(kind: str, exported: Callable[[str], Exported]) -> None:
    folder, parities = exported(kind)
    assert sorted(parities) == ["text_model.onnx", "vision_model.onnx"]
    assert max(parity.largest for parity in parities.values()) <= MOST
    encoder = koclip.load(folder / "model", "cpu")
    model, processor = encoder.model, encoder.processor
    sessions = {name: onnxruntime.InferenceSession(str(folder / "onnx" / name)) for name in parities}
    for texts in (["별"], ["빨간 원 위의 파란 별", "a", ""], ["아주 " * 40]):
        encoded = tokenizers.encode(processor.tokenizer, texts, padding=True, return_tensors="np")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        (embeddings,) = sessions["text_model.onnx"].run(["text_embeds"], inputs)
        torch.testing.assert_close(torch.from_numpy(embeddings), encoder.encode_texts(texts), atol=1e-5, rtol=0)
    side = onnx.view_size(processor.image_processor)
    for count in (1, 3):
        pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        (embeddings,) = sessions["vision_model.onnx"].run(["image_embeds"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = onnx.encode_images(model, pixels)
        torch.testing.assert_close(torch.from_numpy(embeddings), expected, atol=1e-5, rtol=0)


def ends_a_text(kind: str, directory: Path) -> Path:
    """Save a model that reads the embedding at the end token, as CLIP does; its padding token is the end token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, processor = clip(directory)
        if kind == "legacy CLIP":  # reads the largest id, which is the end token
            model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2
        if kind == "joint, CLIP's text tower":
            sizes: dict[str, Any] = {**WIDTH, "image_size": 32, "patch_size": 8}
            model = joint(transformers.ViTModel(transformers.ViTConfig(**sizes)), model.text_model)
            processor = joint_processor(processor.tokenizer)
        draw(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


LONG = ["고양이가 창가에 앉아 있다 " * 20, "a red circle above a blue star " * 20, "빨간 자전거 한 대 " * 20]
SHORT = ["별", "빨간 원 위의 파란 별", "a cat"]


@pytest.mark.parametrize("kind", ["CLIP", "legacy CLIP", "joint, CLIP's text tower", "ChineseCLIP", "joint CLIP"])
def test_ids_as_clients_send_them_are_texts_as_the_tokenizer_cuts_them(
    kind: str, exported: Callable[[str], Exported]
) -> None:
    """transformers.js cuts the end token off texts that are too long, and others pad on the left."""
    folder, _ = exported(kind)
    encoder = koclip.load(folder / "model", "cpu")
    processor = encoder.processor
    tokenizer, longest = processor.tokenizer, 40
    expected = encoder.encode_texts(LONG + SHORT)
    cosines = expected[:3] @ expected[:3].T
    assert cosines.fill_diagonal_(0).max() < 0.999  # different texts
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in LONG + SHORT]
    assert all(len(ids) > longest for ids in whole[:3])
    opened = onnxruntime.InferenceSession(str(folder / "onnx" / "text_model.onnx"))
    for rows in (whole, [ids[:longest] for ids in whole]):
        for side in ("left", "right"):
            for width in (None, 64):
                padding = {"padding": "max_length", "max_length": width} if width and rows is not whole else {}
                sent = dict(tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="np", **padding))
                (embeddings,) = opened.run(
                    ["text_embeds"], {name: sent[name] for name in ("input_ids", "attention_mask")}
                )
                torch.testing.assert_close(torch.from_numpy(embeddings), expected, atol=1e-5, rtol=0)
    for ids, row in zip(whole, expected, strict=True):  # one at a time, cut
        sent = {"input_ids": [ids[:longest]], "attention_mask": [[1] * len(ids[:longest])]}
        (embeddings,) = opened.run(["text_embeds"], sent)
        torch.testing.assert_close(torch.from_numpy(embeddings)[0], row, atol=1e-5, rtol=0)


def test_the_probes_notice_a_graph_of_the_stock_pooling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which reads the first place of a text without an end."""

    def stock(self, input_ids, attention_mask):
        return onnx.encode_texts(self.model, input_ids[:, :40], attention_mask[:, :40])

    monkeypatch.setattr(onnx._Texts, "forward", stock)
    with pytest.raises(RunError, match=r"text_model\.onnx|vision_model\.onnx"):
        export(ends_a_text("CLIP", tmp_path / "model"), tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a tiny CLIP with its graphs, those of 8 bits too."""
    folder = tmp_path_factory.mktemp("small")
    return Exported(folder, export(published(folder), folder, int8=True))


def test_eight_bits_and_what_they_cost(small: Exported) -> None:
    for name in ("vision_model", "text_model"):
        exact, quantized = small.parities[f"{name}.onnx"], small.parities[f"{name}_quantized.onnx"]
        assert exact.largest < quantized.largest < 0.1  # signed weights: 0.25 on a CPU without VNNI
        assert 0.99 < quantized.cosine < 1 - 1e-7
        sizes = [(small.folder / "onnx" / f"{name}{kind}.onnx").stat().st_size for kind in ("", "_quantized")]
        assert sizes[1] < sizes[0]


def test_a_graph_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "MOST", 0.0)
    with pytest.raises(RunError, match=r"text_model\.onnx|vision_model\.onnx"):
        export(published(tmp_path), tmp_path)


@pytest.mark.parametrize(("name", "message"), [(".onnx", "differ by nan"), ("_quantized.onnx", "not finite")])
def test_graphs_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, message) -> None:
    def parity(probes, file):
        broken = file.name == f"text_model{name}"
        return onnx.Parity(float("nan") if broken else 0.0, 1.0)

    monkeypatch.setattr(onnx, "parity", parity)
    with pytest.raises(RunError, match=message):
        export(published(tmp_path), tmp_path, int8=True)


def test_nothing_else_is_written(small: Exported) -> None:
    """No path of this machine in a graph, and one file each."""
    import sys

    names = [f"{side}{kind}.onnx" for side in ("text_model", "vision_model") for kind in ("", "_quantized")]
    files = list((small.folder / "onnx").iterdir())
    assert sorted(file.name for file in files) == names
    for file in files:
        for path in (str(small.folder), koclip.__file__, sys.prefix, "site-packages", "0x7"):
            assert path.encode() not in file.read_bytes()


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"koclip\[onnx\]"):
        export(published(tmp_path), tmp_path)
    assert not (tmp_path / "onnx").exists()
    assert json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["model_type"] == "clip"
