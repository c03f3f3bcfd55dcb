"""What test_dirty runs in every process of a launch, of two and of one: training and alignment on dirty data.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_dirty.py FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import dirty
from align_runs import ENGLISH, KOREAN, align, arguments, write_source
from helpers.process_group import joined
from test_recipes import pretrain

from koclip import config, distributed
from koclip.embeddings import fill
from koclip.text.tokenizers import train_bpe

STEPS = 30  # of 10 pairs: every row comes up
_BATCH = 10  # pairs of all processes


def options(folder: Path, name: str, way: str) -> list[str]:
    """Return a command line: `way` is a number of processes, `pieces`, or a name for one process."""
    sources = json.dumps([config.to_dict(source) for source in dirty.described(folder).sources])
    pieces = ["--train.micro_batch_size", "3"] if way == "pieces" else []
    return [
        *("--data.sources", sources, "--data.max_skipped_fraction", "0.9", "--eval.sets", "[]"),
        *("--train.num_steps", str(STEPS), "--train.save_every", str(STEPS // 2), "--train.log_every", "1"),
        *("--train.batch_size", str(_BATCH // distributed.world_size()), *pieces),
        *("--tokenizer.path", str(folder / "tokenizer"), "--output_dir", str(folder / f"{name}-{way}")),
    ]


def pretrain_on(folder: Path, way: str, *more: str) -> None:
    """Train from random weights."""
    pretrain(*options(folder, "pretrain", way), *more)


def align_on(folder: Path, way: str, *more: str) -> None:
    """Teach a text tower by another one's sentences, then by images whose features are kept."""
    fill.SHARD_ROWS, fill.BATCH_ROWS = 16, 4  # so that each process makes shards
    method = ["--align.method", "two_stage", "--align.first_steps", str(STEPS // 3)]
    align(*arguments(folder / "source", Path("overridden"), *method, *options(folder, "align", way)), *more)


RUNS: dict[str, Callable[..., None]] = {"pretrain": pretrain_on, "align": align_on}


def write(folder: Path) -> None:
    """Write the data, a source CLIP and a tokenizer: of merges that are as frequent, each training chooses anew."""
    dirty.write(folder)
    train_bpe([*KOREAN, *ENGLISH], 600, 24).save_pretrained(folder / "tokenizer")
    write_source(folder / "source")


def main(folder: Path) -> None:
    with joined():
        for run in RUNS.values():
            for way in ("1", "pieces") if distributed.world_size() == 1 else ("2",):
                run(folder, way)
                distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
