"""A new loss is a file and an entry: a toy loss in a copy of koclip trains a model and lands in what the run leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MARGIN = '''"""A toy loss: a hinge on the similarity of other pairs."""

import torch

from koclip import distributed
from koclip.losses.pairs import Embeddings, Loss, Pairs, accuracy


def margin(embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str = "negatives") -> Loss:
    """Return the mean over all pairs of max(0, 0.2 + similarity - own similarity)."""
    logits = embeddings.image @ distributed.gather(embeddings.text).T  # (B, N)
    own, equal = Pairs(pair_ids, duplicates).matches(slice(None))
    hinge = (0.2 + logits - logits[own][:, None]).clamp(min=0).masked_fill(equal, 0)
    return Loss(hinge.mean() + 0 * embeddings.logit_scale, accuracy(logits, equal).mean())
'''
ENTRY = '    "margin": Contrastive(margin),\n'
TRAIN = """
data: {sources: [{scenes_size: 40}]}
model: {image_size: 32, patch_size: 16, image_width: 64, image_layers: 1, text_width: 64, text_layers: 1, embed_dim: 32}
tokenizer: {vocab_size: 600}
optim: {warmup_steps: 1}
train: {num_steps: 2, batch_size: 8, log_every: 1, tracker: none}
eval: {sets: []}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of koclip and its recipes with another loss: one new file and one changed file."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("koclip", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "koclip" / "losses" / "margin.py").write_text(MARGIN, encoding="utf-8")
    entries = folder / "koclip" / "losses" / "__init__.py"
    text = entries.read_text(encoding="utf-8")
    for line, added in (("CONTRASTIVE = {\n", ENTRY), ("import torch\n", "from koclip.losses.margin import margin\n")):
        assert text.count(line) == 1
        text = text.replace(line, line + added)
    entries.write_text(text, encoding="utf-8")
    (folder / "train.yaml").write_text(TRAIN, encoding="utf-8")
    return folder


def pretrain(copy: Path, *args: str) -> subprocess.CompletedProcess[str]:
    words = [str(copy / "recipes" / "pretrain.py"), "--config", str(copy / "train.yaml"), *args]
    environment = {**os.environ, "PYTHONPATH": str(copy), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=copy, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_new_loss_is_a_file_and_an_entry(copy: Path) -> None:
    run = copy / "run"
    done = pretrain(copy, "--loss.name", "margin", "--output_dir", str(run))
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["loss"]["name"] == "margin"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 1 for loss in losses)  # InfoNCE of 8 pairs begins near ln 8
    assert (run / "model" / "model.safetensors").exists()


def test_an_unknown_loss_is_refused_before_data_is_read(copy: Path) -> None:
    done = pretrain(copy, "--data.sources", "[{path: missing.parquet}]", "--loss.name", "margins")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pretrain.py: error: loss.name: got 'margins'")
