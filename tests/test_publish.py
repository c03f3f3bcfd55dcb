"""The published directory, loaded by a program that has never heard of koclip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_dual_encoder, tiny_tokenizer

from koclip.models.dual_encoder import from_scratch
from koclip.models.stock import save_stock_model

STRANGER = """
import json, sys
sys.modules["koclip"] = None  # importing it raises ImportError
import torch
from PIL import Image
from transformers import (AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, CLIPModel, pipeline)

directory, joint = sys.argv[1], sys.argv[2]
classes = [AutoModel] if joint == "VisionTextDualEncoderModel" else [
    AutoModel, CLIPModel, AutoModelForZeroShotImageClassification]
saved = torch.load(directory + "/../expected.pt", weights_only=True)
processor = AutoProcessor.from_pretrained(directory)
encoded = processor(text=saved["captions"], padding=True, return_tensors="pt")
assert encoded["input_ids"].tolist() == saved["input_ids"].tolist()
answer = {"classes": [], "difference": 0.0, "problems": []}
for kind in classes:
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(pixel_values=saved["pixels"], input_ids=saved["input_ids"],
            attention_mask=saved["attention_mask"]).logits_per_image
    answer["classes"].append(type(model).__name__)
    answer["difference"] = max(answer["difference"], (logits - saved["logits"]).abs().max().item())
    answer["problems"] += [key for keys in info.values() for key in keys]
    answer["dtype"] = str(model.dtype)
if joint == "CLIPModel":
    classify = pipeline("zero-shot-image-classification", model=directory)
    scores = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["빨간 원", "파란 사각형", "별"],
                      hypothesis_template="{} 사진")
    answer["labels"] = sorted(score["label"] for score in scores)
    answer["total"] = sum(score["score"] for score in scores)
print(json.dumps(answer))
"""


@pytest.mark.parametrize(
    ("changes", "joint"),
    [
        ({}, "CLIPModel"),
        ({"preset": "timm:test_vit", "image_size": 32}, "VisionTextDualEncoderModel"),
    ],
)
def test_published_model_loads_and_classifies_without_koclip(
    changes: dict[str, object], joint: str, tmp_path: Path
) -> None:
    dual_encoder = tiny_dual_encoder(logit_bias=-10.0, **changes)
    _, processor = from_scratch(tiny_config(**changes), tiny_tokenizer())
    with torch.no_grad():
        for parameter in dual_encoder.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    processor.tokenizer(["길다 " * 40, "짧다"], truncation=True, padding=True, max_length=8)  # leaves state behind
    directory = tmp_path / "model"
    save_stock_model(directory, dual_encoder.model, processor, dual_encoder.state_dict())

    pixels = torch.randn(4, 3, 32, 32)
    captions = ["빨간 원 사진", "a red circle", "노란 삼각형 위에 작은 별", "b"]
    text = dict(tiny_tokenizer()(captions, padding=True, return_tensors="pt"))
    with torch.no_grad():
        logits = dual_encoder.model.eval()(pixel_values=pixels, **text).logits_per_image
    torch.save({"pixels": pixels, "captions": captions, "logits": logits, **text}, tmp_path / "expected.pt")
    ran = subprocess.run(
        [sys.executable, "-c", STRANGER, str(directory), joint], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert set(answer["classes"]) == {joint}
    assert answer["problems"] == []
    assert answer["difference"] == 0
    assert answer["dtype"] == "torch.float32"
    if joint == "CLIPModel":
        assert answer["labels"] == ["별", "빨간 원", "파란 사각형"]
        assert answer["total"] == pytest.approx(1)
    check_files(directory)


def check_files(directory: Path) -> None:
    """Only safetensors and JSON, nothing of a last call, nothing to run."""
    assert {path.suffix for path in directory.iterdir()} == {".safetensors", ".json"}
    assert not [path.name for path in directory.glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["padding"] is None
    assert tokenizer["truncation"] is None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["logit_bias"] == pytest.approx(-10, abs=0.1)
    assert config["dtype"] == "float32"
    assert (directory / "preprocessor_config.json").exists()
