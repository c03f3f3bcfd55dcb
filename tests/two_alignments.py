"""What test_align_processes runs in every process of a launch, of two and of one: every method once, on dirty data.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_alignments.py FOLDER
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from align_runs import align, arguments, write_encoder, write_pairs, write_source
from helpers.process_group import joined
from helpers.tokenizer_families import FAMILIES
from transformers import AutoTokenizer

from koclip import distributed
from koclip.data import survey
from koclip.embeddings import fill
from koclip.text import tokenizers

_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METHODS = {
    "frozen_image": [],
    "lora": ["--lora.target", "both", "--lora.rank", "4"],
    "full": ["--align.first_steps", "3", "--align.second_lr", "5e-4", "--align.layer_decay", "0.9"],
    "distill": ["--distill.mse", "0.5"],
    "two_stage": ["--align.first_steps", "3", "--loss.name", "sigmoid"],
    "unfreeze": ["--align.first_steps", "2", "--align.second_steps", "2", "--align.text_layers", "1"],
    "anchored": ["--align.method", "frozen_image", "--distill.anchor", "0.5"],
    "preserved": ["--align.method", "full", "--distill.preserve", "2", "--loss.tile_rows", "3"],
    "pieces": ["--align.method", "frozen_image", "--train.micro_batch_size", "3"],
    "unused": ["--align.method", "frozen_image"],  # LUKE, whose weights for entities no text uses
}
BROKEN = {"image": 2, "captions_ko": 9, "captions_en": 14, "image and captions": 21}


def write(folder: Path) -> None:
    """Write a source CLIP, photos, and a BERT without dropout, which would draw other numbers in each process."""
    write_source(folder / "source")
    write_pairs(folder / "clean.parquet")
    rows = pq.read_table(folder / "clean.parquet").to_pylist()
    for column, number in BROKEN.items():
        if column.startswith("image"):
            rows[number]["image"] = rows[number]["image"][:80]
        if column != "image":
            rows[number]["captions_en" if column == "captions_en" else "captions_ko"] = ["", None]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    size = len(AutoTokenizer.from_pretrained(folder / "bert"))
    write_encoder(folder / "bert", "bert", size, max_position_embeddings=40, **_DROPOUT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    ids |= {"eos_token_id": tokenizer.sep_token_id}
    sizes = {"max_position_embeddings": 60, "entity_vocab_size": 9, "entity_emb_size": 16}
    write_encoder(folder / "luke", "luke", size, **ids, **sizes, **_DROPOUT)


def run_all(folder: Path) -> None:
    """Align by every method, with the same global batch whatever the number of processes."""
    fill.SHARD_ROWS, fill.BATCH_ROWS, survey.BLOCK = 8, 4, 4  # so that each process has a share
    clean = f"path: {folder / 'clean.parquet'}, captions: {{ko: captions_ko, en: captions_en}}"
    count = distributed.world_size()
    for name, args in METHODS.items():
        method = [] if "--align.method" in args else ["--align.method", name]
        own = {"lora": "same", "unused": str(folder / "luke")}
        encoder = [] if "full" in (name, *args) else ["--model.text_encoder", own.get(name, str(folder / "bert"))]
        rest = ["--train.batch_size", str(8 // count), "--output_dir", str(folder / f"{name}-{count}")]
        rest += ["--eval.sets", f"[{{source: {{{clean}}}, max_images: 8}}]"]
        rest += ["--optim.eps", "1e-4"]  # with 1e-6, AdamW's first steps turn rounding into moves
        if name == "unused":
            rest += ["--tokenizer.path", str(folder / "bert")]
        if name == "preserved":  # the pairs with English captions are compared with the source
            mixed = clean.replace("clean", "pairs") + ", languages: {ko: 0.5, en: 0.5}"
            rest += ["--data.sources", f"[{{{mixed}}}]"]
        with counted() as measured:
            align(*arguments(folder / "source", folder / "pairs.parquet", *method, *encoder, *args, *rest))
        everyone = distributed.gather_objects(len(measured))
        if distributed.rank() == 0:
            (folder / f"{name}-{count}" / "measured.json").write_text(json.dumps(everyone))


@contextmanager
def counted() -> Iterator[list[str]]:
    """Note the captions that this process tokenises without padding them: to know how long they are."""
    measured: list[str] = []
    encode = tokenizers.encode

    def noted(tokenizer: Any, captions: list[str], **options: Any) -> Any:
        measured.extend([] if options.get("padding") else captions)
        return encode(tokenizer, captions, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "encode", noted)
        yield measured


def main(folder: Path) -> None:
    with joined():
        run_all(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
