"""The pages docs/how_to_add/: their code is applied to a copy of the project, and whole runs there use all of it.

A Python block below a path is a new file. A diff block is a change of that file: its lines without `+` are there once.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm_python
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import CLIPImageProcessor, CLIPSegConfig, CLIPSegModel, CLIPSegProcessor

ROOT = Path(__file__).parents[1]
WITHOUT_KOCLIP = ("torch._dynamo", "transformers.models.clip.modeling_clip", "accelerate", "datasets", "peft", "timm")
COLOURS = {"빨강": (220, 30, 30), "초록": (30, 180, 60), "파랑": (40, 60, 220), "노랑": (230, 210, 40)}

DATA_CARD = """---
id: rows
source: drawn by a test
files: {rows.pipe: SHA256}
licenses:
  - {part: pictures and captions, id: apache-2.0, source: koclip's LICENSE}
languages: [ko]
columns: {image: RGB, text: a Korean caption}
rows: {train: 16}
used_by: []
---
# Toys

**Limits.** Four colours.

**Harms.** None.
"""
PAGES = ROOT / "docs" / "how_to_add"
# By page: the files that a new loss, task, ... changes.
FILES = {
    "format": {"koclip/data/formats/pipe.py"},
    "loss": {"koclip/losses/smooth.py", "koclip/losses/__init__.py"},
    "task": {"koclip/evaluation/tasks/two_way.py", "koclip/evaluation/tasks/__init__.py"},
    "method": {"koclip/config/alignment.py", "koclip/align/methods.py"},
    "model": {"koclip/encoders/ensemble.py", "koclip/models/stock.py", "koclip/text/tokenizers.py"},
}
BLOCK = re.compile(r"^`(koclip/\S+)`\n\n```(python|diff)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all the new things."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("koclip", "recipes", "data_cards"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name, files in FILES.items():
        blocks = BLOCK.findall((PAGES / f"{name}.en.md").read_text(encoding="utf-8"))
        assert {file for file, _, _ in blocks} == files
        for file, kind, code in blocks:
            apply(copy / file, kind, code)
    records = [
        {"caption_ko": f"{name} 그림 {number}", "colour": colour}
        for number in range(4)
        for name, colour in COLOURS.items()
    ]
    rows = write_pictures(copy / "pictures", records)
    (copy / "rows.pipe").write_text("".join(f"{image}|{caption}\n" for image, caption in rows), encoding="utf-8")
    checksum = hashlib.sha256((copy / "rows.pipe").read_bytes()).hexdigest()
    (copy / "data_cards" / "rows.md").write_text(DATA_CARD.replace("SHA256", checksum), encoding="utf-8")
    return copy


def apply(file: Path, kind: str, code: str) -> None:
    if kind == "python":
        assert not file.exists()
        file.write_text(code, encoding="utf-8")
        return
    lines = code.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has these lines {text.count(old)} times:\n{old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_every_page_is_applied():
    assert {page.name.split(".")[0] for page in PAGES.iterdir()} == set(FILES)


def write_pictures(folder: Path, records: list[dict]) -> list[tuple[Path, str]]:
    folder.mkdir()
    rows = []
    for number, record in enumerate(records):
        Image.new("RGB", (40, 40), record["colour"]).save(folder / f"{number}.png")
        rows.append((folder / f"{number}.png", record["caption_ko"]))
    return rows


def run(project: Path, recipe: str, *args: str, code: int = 0) -> str:
    """Run a recipe of the copy, which exits with `code`; return what it prints."""
    return python(project, str(project / "recipes" / f"{recipe}.py"), *args, code=code)


def python(project: Path, *args: str, code: int = 0) -> str:
    """Run Python in the copy."""
    environment = {"PYTHONPATH": str(project), "PATH": "/usr/bin:/bin", "ACCELERATE_USE_CPU": "true", "COLUMNS": "160"}
    done = warm_python.run(args, cwd=project, env=environment, libraries=WITHOUT_KOCLIP)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


ROWS = "{path: rows.pipe, image: image, captions: {ko: text}}"
SETS = f"[{{source: {ROWS}, tasks: [retrieval, two_way]}}]"
TRAINING = [
    *("--data.sources", f"[{ROWS}]", "--data.num_workers", "0", "--data.length_pool", "1", "--eval.sets", SETS),
    *("--train.num_threads", "1", "--train.tracker", "none", "--train.batch_size", "4", "--train.num_steps", "4"),
    *("--train.log_every", "1", "--train.eval_every", "0", "--optim.warmup_steps", "1"),
]


@pytest.fixture(scope="module")
def trained(project: Path) -> tuple[Path, str]:
    """A run that reads the new format, has the new loss and measures the new task; what it prints."""
    sizes = ("--model.image_width", "32", "--model.text_width", "32", "--model.image_layers", "1")
    tokens = ("--tokenizer.vocab_size", "600", "--model.text_layers", "1")
    output = run(project, "pretrain", *TRAINING, *sizes, *tokens, "--loss.name", "smooth", "--output_dir", "runs/new")
    return project / "runs" / "new", output


def measured(run: Path) -> dict[str, Any]:
    """Return the number of the new task."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metric: dict[str, Any] = results["metrics"]["rows/ko/two_way/accuracy"]
    return metric


def weights(model: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(model / "model.safetensors")
    return tensors


def test_a_format_a_loss_and_a_task_reach_results_table_report_and_picture(trained: tuple[Path, str]) -> None:
    directory, output = trained
    metric = measured(directory)
    assert metric["n"] == 16
    assert metric["value"] in [hits / 16 for hits in range(17)]
    row = f"| own image of two | ko | 16 | {100 * metric['value']:.1f} ("
    assert row in (directory / "table.md").read_text(encoding="utf-8")
    assert "own image of two" in output
    assert "captions that fit their own image better" in (directory / "report.html").read_text(encoding="utf-8")
    assert (directory / "pictures" / "two_way-rows.png").is_file()


def test_the_loss_is_the_smoothed_cross_entropy(project: Path) -> None:
    """With a target that gives 0.1 to all texts alike, and the rest to the image's own."""
    code = (
        "import torch; from koclip.losses.smooth import smooth; from koclip.losses.contrastive import Embeddings\n"
        "image, text = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)\n"
        "own = smooth(Embeddings(image, text, torch.tensor(9.0)), torch.arange(5)).value\n"
        "ways = (9 * image @ text.T, 9 * text @ image.T)\n"
        "losses = [torch.nn.functional.cross_entropy(way, torch.arange(5), label_smoothing=0.1) for way in ways]\n"
        "torch.testing.assert_close(own, sum(losses) / 2)\n"
        "for duplicates in ('masked', 'positives'):\n"
        "    assert smooth(Embeddings(image, text, torch.tensor(9.0)), torch.tensor([0, 0, 1, 2, 3]), duplicates)"
        ".value.isfinite()"
    )
    python(project, "-c", code)


def test_a_broken_line_of_the_format_is_refused(project: Path) -> None:
    (project / "broken.pipe").write_text("no bar here\n", encoding="utf-8")
    source = ("--data.sources", "[{path: broken.pipe, image: image, captions: {ko: text}}]", "--eval.sets", "[]")
    error = run(project, "pretrain", *TRAINING, *source, "--output_dir", "runs/broken", code=2)
    assert "broken.pipe, line 1" in error


def test_a_task_reaches_the_card(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    run(project, "publish", "--model", str(directory / "model"), "--repo_id", "new/model", "--dry_run")
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    assert "| rows | own image of two |" in card
    assert "두 이미지 가운데 맞는 것을 고른 비율: " in card


def test_a_way_to_align_trains_the_biases_alone(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    source = ("--model.clip", str(directory / "model"), "--model.text_encoder", "same", "--data.num_crops", "1")
    run(project, "align", *TRAINING, *source, "--align.method", "biases", "--output_dir", "runs/biases")
    before, after = weights(directory / "model"), weights(project / "runs" / "biases" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "text_projection.weight" in changed
    assert len(changed) > 3
    assert all(name == "text_projection.weight" or re.fullmatch(r"text_model\..*bias", name) for name in changed)


def test_an_encoder_is_evaluated_and_named_in_errors(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    model = directory / "model"
    run(project, "evaluate", "--model", f"ensemble:{model}+{model}", "--sets", SETS, "--output_dir", "runs/measured")
    results = next((project / "runs" / "measured").rglob("results.json"))
    assert measured(results.parent)["value"] == pytest.approx(measured(directory)["value"], abs=1e-5)
    error = run(project, "evaluate", "--model", "ensembel:5", "--sets", SETS, "--output_dir", "runs/none", code=2)
    assert "ensemble:<any of these>" in error


@pytest.fixture
def clipseg(project: Path) -> Path:
    """A tiny CLIPSeg in a directory."""
    tokenizer = tiny_tokenizer(40)
    width = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**width, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {**width, "image_size": 32, "patch_size": 16}
    model = CLIPSegModel(CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=16))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(project / "clipseg")
    CLIPSegProcessor(images, tokenizer).save_pretrained(project / "clipseg")
    return project / "clipseg"


def test_a_model_class_is_trained_and_loads_as_itself(project: Path, clipseg: Path) -> None:
    source = ("--model.clip", str(clipseg), "--model.text_encoder", "same", "--data.num_crops", "1")
    run(project, "align", *TRAINING, *source, "--align.method", "frozen_image", "--output_dir", "runs/clipseg")
    model = project / "runs" / "clipseg" / "model"
    before, after = weights(clipseg), weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("text_model"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision_model"))
    assert json.loads((model / "config.json").read_text())["architectures"] == ["CLIPSegModel"]
    assert measured(model.parent)["n"] == 16  # the saved model was loaded and evaluated
