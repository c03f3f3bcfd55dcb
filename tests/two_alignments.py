"""What test_align_processes runs in every process of a launch, of two and of one: every method once.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_alignments.py FOLDER
"""

import sys
from pathlib import Path

import torch
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from test_published_tokenizers import FAMILIES
from transformers import AutoTokenizer

from koclip import distributed
from koclip.data import feature_rows

_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METHODS = {
    "frozen_image": [],
    "lora": ["--lora.target", "both", "--lora.rank", "4"],
    "full": ["--align.first_steps", "3", "--align.second_lr", "5e-4", "--align.layer_decay", "0.9"],
    "distill": ["--distill.mse", "0.5"],
    "two_stage": ["--align.first_steps", "3", "--loss.name", "sigmoid"],
    "anchored": ["--align.method", "frozen_image", "--distill.anchor", "0.5"],
}


def write(folder: Path) -> None:
    """Write a source CLIP, photos, and a BERT without dropout, which would draw other numbers in each process."""
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet")
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    size = len(AutoTokenizer.from_pretrained(folder / "bert"))
    write_encoder(folder / "bert", "bert", size, max_position_embeddings=40, **_DROPOUT)


def run_all(folder: Path) -> None:
    """Align by every method, with the same global batch whatever the number of processes."""
    feature_rows.ROWS, feature_rows.PIECE = 8, 4  # so that each process makes shards
    count = distributed.world_size()
    for name, args in METHODS.items():
        method = [] if name == "anchored" else ["--align.method", name]
        encoder = [] if name == "full" else ["--model.text_encoder", "same" if name == "lora" else str(folder / "bert")]
        rest = ["--train.batch_size", str(8 // count), "--output_dir", str(folder / f"{name}-{count}")]
        align(*arguments(folder / "source", folder / "pairs.parquet", *method, *encoder, *args, *rest))


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    run_all(folder)
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
