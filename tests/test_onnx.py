"""ONNX graphs compute the model's embeddings, for any number of pictures and any length of text."""

import json
from pathlib import Path

import pytest
import torch
from peer_models import saved
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

import koclip
from koclip.checkpoint import publish
from koclip.config import ConfigError, RunError
from koclip.models.dual_encoder import from_scratch
from koclip.publishing import onnx_export
from koclip.publishing.onnx_export import MOST, export
from koclip.text import tokenizers

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


def published(folder: Path) -> Path:
    dual_encoder = tiny_dual_encoder()
    _, processor = from_scratch(tiny_config(), tiny_tokenizer())
    publish(folder / "model", dual_encoder.model, processor, dual_encoder.state_dict())
    return folder / "model"


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "joint ViT", "joint timm"])
def test_graphs_equal_the_model(kind: str, tmp_path: Path) -> None:
    model_dir = saved(kind, tmp_path / "model")
    found = export(model_dir, tmp_path)
    assert sorted(found) == ["text_model.onnx", "vision_model.onnx"]
    assert max(one.largest for one in found.values()) <= MOST
    model, processor = koclip.load(model_dir, "cpu")
    sessions = {name: onnxruntime.InferenceSession(str(tmp_path / "onnx" / name)) for name in found}
    for texts in (["별"], ["빨간 원 위의 파란 별", "a", ""], ["아주 " * 40]):
        encoded = tokenizers.encode(processor.tokenizer, texts, padding=True, return_tensors="np")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        (made,) = sessions["text_model.onnx"].run(["text_embeds"], inputs)
        torch.testing.assert_close(
            torch.from_numpy(made), koclip.embed_texts(model, processor, texts), atol=1e-5, rtol=0
        )
    side = onnx_export.view_size(processor.image_processor)
    for count in (1, 3):
        pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        (made,) = sessions["vision_model.onnx"].run(["image_embeds"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = onnx_export.encode_images(model, pixels)
        torch.testing.assert_close(torch.from_numpy(made), expected, atol=1e-5, rtol=0)


def test_eight_bits_and_what_they_cost(tmp_path: Path) -> None:
    model_dir = published(tmp_path)
    found = export(model_dir, tmp_path, int8=True)
    for name in ("vision_model", "text_model"):
        exact, small = found[f"{name}.onnx"], found[f"{name}_quantized.onnx"]
        assert exact.largest < small.largest < 0.1
        assert 0.98 < small.cosine < 1 - 1e-7
        sizes = [(tmp_path / "onnx" / f"{name}{kind}.onnx").stat().st_size for kind in ("", "_quantized")]
        assert sizes[1] < sizes[0]


def test_a_graph_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MOST", 0.0)
    with pytest.raises(RunError, match="differs from the model by"):
        export(published(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "told"), [(".onnx", "differs from the model by nan"), ("_quantized.onnx", "not finite")]
)
def test_graphs_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, told) -> None:
    def parity(side, inputs, file):
        broken = file.name == f"text_model{name}"
        return onnx_export.Parity(float("nan") if broken else 0.0, 1.0)

    monkeypatch.setattr(onnx_export, "parity", parity)
    with pytest.raises(RunError, match=told):
        export(published(tmp_path), tmp_path, int8=True)


def test_nothing_else_is_written(tmp_path: Path) -> None:
    """No path of this machine in a graph, and one file each."""
    export(published(tmp_path), tmp_path)
    assert sorted(file.name for file in (tmp_path / "onnx").iterdir()) == ["text_model.onnx", "vision_model.onnx"]
    for file in (tmp_path / "onnx").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"koclip\[onnx\]"):
        export(published(tmp_path), tmp_path)
    assert not (tmp_path / "onnx").exists()
    assert json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["model_type"] == "clip"
