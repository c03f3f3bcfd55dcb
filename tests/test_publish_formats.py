"""recipes/publish.py --onnx --sentence_transformers: the formats are part of what is checked and pushed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from runs_to_publish import pretrained
from safetensors.torch import load_file, save_file

from koclip import config
from koclip.publishing.checks import publishable
from koclip.publishing.formats.onnx import export
from koclip.publishing.preflight import preflight


def test_formats_pass_the_pre_flight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = pretrained(tmp_path / "run")
    spec = importlib.util.spec_from_file_location(
        "publish_recipe", Path(__file__).parents[1] / "recipes" / "publish.py"
    )
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    args = ["--model", str(directory), "--repo_id", "org/name", "--dry_run", "--onnx", "int8"]
    args += ["--int8_sets", "[{source: {path: scenes, name: drawn, scenes_part: test, scenes_size: 20}}]"]
    recipe.main(config.parse(config.PublishConfig, [*args, "--sentence_transformers"]))
    printed = capsys.readouterr().out
    for side in ("text_model", "vision_model"):
        assert f"{side}.onnx: embeddings differ by " in printed
        assert f"{side}_quantized.onnx: embeddings differ by " in printed
    assert "Measured on drawn (20 images; R@1 by chance: about 5 %)" in printed
    assert "Nothing was pushed" in printed
    assert "Measured on drawn (20 images;" in (directory / "README.md").read_text(encoding="utf-8")
    wanted = {f"onnx/{side}{kind}.onnx" for side in ("text_model", "vision_model") for kind in ("", "_quantized")}
    wanted |= {
        "onnx/results.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Normalize/config.json",
    }
    assert wanted <= set(publishable(directory))


def test_graphs_of_other_weights_are_found(tmp_path: Path) -> None:
    directory = pretrained(tmp_path / "run")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    export(directory, directory)
    assert not [check for check in preflight(directory) if check.problems]
    weights = load_file(directory / "model.safetensors")
    weights["visual_projection.weight"] *= torch.linspace(0.9, 1.1, 32)[:, None]  # (D, W)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("text_model_quantized.onnx", "vision_model_quantized.onnx"):
        (directory / "onnx" / name).write_bytes((directory / "onnx" / name.replace("_quantized", "")).read_bytes())
    (failing,) = [check for check in preflight(directory) if check.problems]
    assert failing.name == "graphs in onnx/ are the model's"
    assert failing.problems[0].startswith("vision_model.onnx: embeddings differ by 0.0")
    assert failing.problems[1].startswith("onnx/results.json is missing")
    assert len(failing.problems) == 2
