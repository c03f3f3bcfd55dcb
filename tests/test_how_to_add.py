"""A new loss, task, way to align, encoder and format: how many files each changes, and that all of them arrive.

Each is a patch of a copy of the project. Whole runs of the recipes there then use all of them.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sources_on_disk import TOY_FORMAT

ROOT = Path(__file__).parents[1]
COLOURS = {"빨강": (220, 30, 30), "초록": (30, 180, 60), "파랑": (40, 60, 220), "노랑": (230, 210, 40)}

LOSS = '''"""The squared distance of each pair."""

from koclip.losses.contrastive import Loss


def toy(embeddings, pair_ids, duplicates):
    """Return the mean squared distance between an image and its text."""
    distance = (embeddings.image - embeddings.text).square().sum(dim=-1).mean()
    return Loss(distance * embeddings.logit_scale, distance.detach())
'''
TASK = '''"""Which captions hold the digit 1."""

import torch

from koclip.evaluation.results import Spec, Task
from koclip.metrics import share


def _run(embedder, eval_set, language):
    captions = [text for texts in eval_set.texts(language) for text in texts]
    return {"toy_task/accuracy": share(torch.tensor(["1" in text for text in captions]))}


TASK = Task(
    "toy_task",
    _run,
    lambda eval_set: eval_set.languages,
    (
        Spec(
            pattern="toy_task/accuracy",
            label="captions of toys",
            summary="captions with a digit",
            chart=("toys", ""),
            headline={"ko": "숫자 있는 설명"},
        ),
    ),
)
'''
ENCODER = '''"""A model of koclip under another name."""

from koclip.encoders.transformers import open_spec as open_stock

FORM = "toy:<directory>"


def open_spec(spec, device):
    """Open the model behind the colon."""
    return open_stock(spec.removeprefix("toy:"), device)
'''
DATA_CARD = """---
id: rows
source: drawn by a test
files: {rows.toy: SHA256}
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
# What each new thing changes: a new file, or lines of a file and what replaces them.
PATCHES: dict[str, dict[str, str | tuple[tuple[str, str], ...]]] = {
    "format": {"data/formats/toy.py": TOY_FORMAT},
    "loss": {
        "losses/toy.py": LOSS,
        "losses/__init__.py": (
            ("from koclip.losses.tiled", "from koclip.losses.toy import toy\nfrom koclip.losses.tiled"),
            ("\nCONTRASTIVE = {\n", '\nCONTRASTIVE = {\n    "toy": Contrastive(toy),\n'),
        ),
    },
    "task": {
        "evaluation/tasks/toy.py": TASK,
        "evaluation/tasks/__init__.py": (
            ("import multiple_choice, probe, ", "import multiple_choice, probe, toy, "),
            ("    retrieval.RETRIEVAL,\n", "    retrieval.RETRIEVAL,\n    toy.TASK,\n"),
        ),
    },
    "way to align": {
        "config/alignment.py": (
            (
                '    "distill": Method((_DISTILL,)),\n',
                '    "distill": Method((_DISTILL,)),\n    "toy_way": Method((_FROZEN,)),\n',
            ),
        ),
        "align/methods.py": (
            (
                '    "distill": _WEIGHTS,\n',
                '    "distill": _WEIGHTS,\n    "toy_way": _WEIGHTS._replace(attach=lambda *_: "A toy way."),\n',
            ),
        ),
    },
    "encoder": {"encoders/toy.py": ENCODER},
}
MOST_FILES = {"format": 1, "loss": 2, "task": 2, "way to align": 2, "encoder": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all the new things."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("koclip", "recipes", "data_cards"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name, changes in PATCHES.items():
        assert len(changes) == MOST_FILES[name]
        for path, change in changes.items():
            file = copy / "koclip" / path
            if isinstance(change, str):
                assert not file.exists()
                file.write_text(change, encoding="utf-8")
            else:
                text = file.read_text(encoding="utf-8")
                for old, new in change:
                    assert text.count(old) == 1, f"{path} has no single {old!r}"
                    text = text.replace(old, new)
                file.write_text(text, encoding="utf-8")
    records = [
        {"caption_ko": f"{name} 그림 {number}", "colour": colour}
        for number in range(4)
        for name, colour in COLOURS.items()
    ]
    rows = write_pictures(copy / "pictures", records)
    (copy / "rows.toy").write_text("".join(f"{image}|{caption}\n" for image, caption in rows), encoding="utf-8")
    checksum = hashlib.sha256((copy / "rows.toy").read_bytes()).hexdigest()
    (copy / "data_cards" / "rows.md").write_text(DATA_CARD.replace("SHA256", checksum), encoding="utf-8")
    return copy


def write_pictures(folder: Path, records: list[dict]) -> list[tuple[Path, str]]:
    folder.mkdir()
    rows = []
    for number, record in enumerate(records):
        Image.new("RGB", (40, 40), record["colour"]).save(folder / f"{number}.png")
        rows.append((folder / f"{number}.png", record["caption_ko"]))
    return rows


def run(project: Path, recipe: str, *args: str, code: int = 0) -> str:
    """Run a recipe of the copy, which exits with `code`; return what it prints."""
    command = [sys.executable, str(project / "recipes" / f"{recipe}.py"), *args]
    done = subprocess.run(
        command,
        cwd=project,
        env={"PYTHONPATH": str(project), "PATH": "/usr/bin:/bin", "ACCELERATE_USE_CPU": "true", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


ROWS = "{path: rows.toy, image: image, captions: {ko: text}}"
SETS = f"[{{source: {ROWS}, tasks: [retrieval, toy_task]}}]"
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
    output = run(project, "pretrain", *TRAINING, *sizes, *tokens, "--loss.name", "toy", "--output_dir", "runs/toy")
    return project / "runs" / "toy", output


def measured(run: Path) -> str:
    """Return the number of the new task as tables show it."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return f"{100 * results['metrics']['rows/ko/toy_task/accuracy']['value']:.1f}"


def test_a_format_a_loss_and_a_task_reach_results_table_report_and_picture(trained: tuple[Path, str]) -> None:
    directory, output = trained
    assert measured(directory) == "25.0"
    assert "captions of toys" in output
    assert "| captions of toys | ko | 16 | 25.0 (" in (directory / "table.md").read_text(encoding="utf-8")
    assert "captions with a digit" in (directory / "report.html").read_text(encoding="utf-8")
    assert (directory / "pictures" / "toys-rows.png").is_file()


def test_a_task_reaches_the_card(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    run(project, "publish", "--model", str(directory / "model"), "--repo_id", "toys/toy", "--dry_run")
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    assert "| rows | captions of toys | 25.0 |" in card
    assert "숫자 있는 설명: 25.0 %" in card


def test_a_way_to_align_trains(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    source = ("--model.clip", str(directory / "model"), "--data.num_crops", "1", "--tokenizer.vocab_size", "600")
    output = run(project, "align", *TRAINING, *source, "--align.method", "toy_way", "--output_dir", "runs/aligned")
    assert "A toy way." in output
    assert measured(project / "runs" / "aligned") == "25.0"


def test_an_encoder_is_evaluated_and_named_in_errors(project: Path, trained: tuple[Path, str]) -> None:
    directory, _ = trained
    arguments = ("--sets", SETS, "--output_dir", "runs/measured")
    output = run(project, "evaluate", "--model", f"toy:{directory / 'model'}", *arguments)
    assert "captions of toys" in output
    assert next((project / "runs" / "measured").rglob("results.json"))
    assert "toy:<directory>" in run(project, "evaluate", "--model", "toi:5", *arguments, code=2)
