"""Tiny dual encoders of every class as sources of an alignment, for several test files.

As a script, in every process of a launch: train each source with both towers, on the same global batch.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/dual_sources.py FOLDER
"""

import json
import sys
from pathlib import Path

from align_runs import align, arguments, write_pairs
from helpers.process_group import joined
from open_clip_checkpoints import write
from peer_models import saved

from koclip import distributed

OPEN_CLIP = {"open_clip OpenAI": "OpenAI", "open_clip SigLIP": "SigLIP"}
SOURCES = ["CLIP", "ChineseCLIP", "AltCLIP", "MetaCLIP 2", "SigLIP", "SigLIP 2", "joint ViT", *OPEN_CLIP]
SIGMOID = ["SigLIP", "SigLIP 2", "open_clip SigLIP"]
FULL = ("--model.text_encoder", "same", "--align.method", "full", "--align.first_steps", "2", "--eval.sets", "[]")


def named(place: Path, kind: str) -> str:
    """Return the `model.clip` of a source."""
    return f"open_clip:local-dir:{place / 'open_clip' / kind}" if kind in OPEN_CLIP else str(place / kind)


def loss_of(kind: str) -> tuple[str, ...]:
    """Return the arguments for the loss that a source was trained with."""
    return ("--loss.name", "sigmoid") if kind in SIGMOID else ()


def write_sources(place: Path) -> Path:
    """Write pairs and every source. open_clip's are not converted."""
    write_pairs(place / "pairs.parquet")
    for kind in SOURCES:
        if kind in OPEN_CLIP:
            write(OPEN_CLIP[kind], place / "open_clip" / kind)
        else:
            without_dropout(saved(kind, place / kind))
    return place


def without_dropout(directory: Path) -> Path:
    """Set the dropout of the towers to 0. It would draw other numbers in each process."""
    config = json.loads((directory / "config.json").read_text())
    for tower in (config["text_config"], config["vision_config"]):
        tower |= {name: 0.0 for name in tower if name.endswith(("dropout", "dropout_prob"))}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def train_all(place: Path) -> None:
    """Train both towers of every source. The global batch is the same for any number of processes."""
    count = distributed.world_size()
    for kind in SOURCES:
        rest = ("--train.batch_size", str(8 // count), "--output_dir", str(place / "runs" / f"{kind}-{count}"))
        align(*arguments(named(place, kind), place / "pairs.parquet", *FULL, *loss_of(kind), *rest))


if __name__ == "__main__":
    with joined():
        train_all(Path(sys.argv[1]))
