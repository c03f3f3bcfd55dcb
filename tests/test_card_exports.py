"""What a card says of the formats beside the model: tags, lines to use them, and what works in transformers.js."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hub_rules import metadata_problems
from huggingface_hub import ModelCard
from PIL import Image
from runs_to_publish import pretrained

from koclip.config import PublishConfig
from koclip.encoders import load
from koclip.publishing.card import render
from koclip.publishing.card_inputs import gather
from koclip.publishing.formats.onnx import export

ROOT = Path(__file__).parents[1]
GRAPHS = {
    "fp32": ("text_model.onnx", "vision_model.onnx"),
    "q8": ("text_model_quantized.onnx", "vision_model_quantized.onnx"),
}
NODE = os.environ.get("KOCLIP_NODE_MODULES")  # where npm installed @huggingface/transformers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return pretrained(tmp_path / "run").parent


def card_of(run: Path) -> ModelCard:
    cfg = PublishConfig(model=str(run / "model"), repo_id="org/my-clip", data_cards=str(ROOT / "data_cards"))
    return render(cfg, gather(cfg), year=2026)


@pytest.mark.parametrize(
    ("files", "tags", "sections"),
    [
        ([], [], []),
        (["modules.json"], ["sentence-transformers"], ["sentence-transformers"]),
        (["onnx/text_model.onnx"], [], []),  # half of an export
        ([f"onnx/{name}" for name in GRAPHS["fp32"]], ["onnx", "transformers.js"], ["ONNX Runtime", "transformers.js"]),
        (
            ["modules.json", *(f"onnx/{name}" for name in GRAPHS["q8"])],
            ["onnx", "transformers.js", "sentence-transformers"],
            ["sentence-transformers", "ONNX Runtime", "transformers.js"],
        ),
    ],
)
def test_tags_and_usage_follow_the_files_that_are_there(run, files, tags, sections):
    for name in files:
        (run / "model" / name).parent.mkdir(exist_ok=True)
        (run / "model" / name).write_bytes(b"")
    card = card_of(run)
    assert card.data["tags"] == ["clip", "koclip", "korean", *tags]
    assert metadata_problems(str(card)) == []
    assert re.findall(r"^### (.+)$", card.text.split("## Data")[0], re.M) == ["transformers", "koclip", *sections]


@pytest.mark.parametrize("kinds", [["fp32"], ["fp32", "q8"], ["q8"]])
def test_the_card_says_what_works_in_transformers_js(run, kinds):
    (run / "model" / "onnx").mkdir()
    for name in (name for kind in kinds for name in GRAPHS[kind]):
        (run / "model" / "onnx" / name).write_bytes(b"")
    section = card_of(run).text.split("### transformers.js")[1].split("## Data")[0]
    assert "`CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`" in section
    assert re.search(r"pipeline `zero-shot-image-classification`.* fails: .*`onnx/model.onnx`", section)
    assert f'dtype: "{kinds[0]}"' in section
    assert f"`dtype` must be {' or '.join(kinds)}" in section
    assert ("no file for q8" in section) == ("q8" not in kinds)


@pytest.mark.skipif(not (NODE and shutil.which("node")), reason="KOCLIP_NODE_MODULES names no node_modules")
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_lines_for_transformers_js_run(run, tmp_path, kind):
    export(run / "model", run / "model", int8=kind == "int8")
    (lines,) = re.findall(r"```js\n(.+?)```", card_of(run).text, re.DOTALL)
    if kind == "int8":
        lines = lines.replace("fp32", "q8")
    (tmp_path / "node_modules").symlink_to(NODE)
    (tmp_path / "models" / "org").mkdir(parents=True)
    (tmp_path / "models" / "org" / "my-clip").symlink_to(run / "model")
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "photo.png")  # of the model's size
    local = 'import { env } from "@huggingface/transformers";\nenv.allowRemoteModels = false;\n'
    local += f"env.localModelPath = {json.dumps(str(tmp_path / 'models'))};\n"
    shown, wanted = (
        "text_embeds.tolist(), image_embeds.tolist()",
        "JSON.stringify([text_embeds.tolist(), image_embeds.tolist()])",
    )
    assert shown in lines
    script = local + lines.replace("photo.jpg", "photo.png").replace(shown, wanted)
    (tmp_path / "lines.mjs").write_text(script, encoding="utf-8")
    ran = subprocess.run(["node", "lines.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    texts, images = (torch.tensor(rows) for rows in json.loads(ran.stdout))
    encoder = load(run / "model", "cpu")
    far = 1e-5 if kind == "fp32" else 0.1
    assert (texts - encoder.encode_texts(["고양이 사진", "강아지 사진"])).abs().max() < far
    assert (images - encoder.encode_images([tmp_path / "photo.png"])).abs().max() < far
