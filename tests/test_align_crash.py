"""Alignments killed at any moment and resumed end with the bits of the run that nobody disturbed.

While features are made, during a step or a save, between two stages; the default tier has a sample, `-m slow` all.
Everything random is turned on: dropout, word dropout, random views; and an average of the weights.
"""

import json
from pathlib import Path

import dying_alignments
import pyarrow.parquet as pq
import pytest
from align_runs import arguments, write_encoder, write_pairs, write_source
from helpers.tokenizer_families import FAMILIES
from helpers.warm_python import start_in_processes, wait
from sources_on_disk import write_tar
from transformers import AutoTokenizer

STEPS, FIRST = 8, 4  # a checkpoint every second step
TWO_STAGES = ["--align.first_steps", str(FIRST), "--align.second_lr", "5e-4"]
METHODS = {
    "frozen_image": [],
    "anchored": ["--distill.anchor", "0.5"],
    "lora": ["--align.method", "lora", "--lora.dropout", "0.2", "--lora.target", "both"],
    "full": ["--align.method", "full", *TWO_STAGES],
    "distill": ["--align.method", "distill", "--distill.mse", "0.1"],
    "two_stage": ["--align.method", "two_stage", *TWO_STAGES],
    "unfreeze": [
        *("--align.method", "unfreeze", "--align.first_steps", "3", "--align.second_steps", "3"),
        *("--align.text_layers", "1", "--align.second_lr", "5e-4", "--data.word_dropout", "0"),
    ],
}
EVERYWHERE = ["step-0", "step-2", "checkpoint-1", "step-5", "checkpoint-2", "step-7", "publish-0"]
BOUNDARY = ["between-0", "step-4", "step-4 step-0", "between-0 step-1"]
MOMENTS = {
    "frozen_image": ["features-1", *EVERYWHERE],
    "anchored": ["features-1", "features-4", *EVERYWHERE],
    "lora": EVERYWHERE,
    "full": ["features-2", *EVERYWHERE, *BOUNDARY],
    "distill": ["features-1", *EVERYWHERE],
    "two_stage": ["features-1", "features-4", "features-3 features-1", *EVERYWHERE, *BOUNDARY],
    "unfreeze": [
        "features-4",
        "between-0 between-0 step-1",
        *EVERYWHERE,
        "between-0",
        "between-1",
        "step-3 step-0",
        "step-6",
        "between-1 step-0",
    ],
}
SAMPLE = {
    ("frozen_image", "features-1"),
    ("lora", "step-5"),
    ("full", "step-5"),
    ("two_stage", "checkpoint-1"),
    ("two_stage", "publish-0"),
    ("two_stage", "features-3 features-1"),
    ("two_stage", "step-4 step-0"),
    ("unfreeze", "between-0 between-0 step-1"),
}
IN_TWO = {("anchored", "features-3"), ("two_stage", "between-0 step-1"), ("full", "step-5"), ("lora", "step-2")}
STREAMED = [("two_stage", moments) for moments in ("step-2", "between-0", "step-5", "step-6")]
ALL = [(method, moments, "parquet", 1) for method, several in MOMENTS.items() for moments in several]
ALL += [(method, moments, "parquet", 2) for method, moments in sorted(IN_TWO)]
ALL += [(method, moments, "webdataset", 1) for method, moments in STREAMED]
QUICK = {(*case, "parquet", 1) for case in SAMPLE}
QUICK |= {("two_stage", "between-0 step-1", "parquet", 2), ("two_stage", "step-5", "webdataset", 1)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source CLIP, photos in a table and in tar shards, and a BERT with dropout."""
    folder = tmp_path_factory.mktemp("align")
    write_source(folder / "source")
    write_pairs(folder / "pairs.parquet", 24)
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    for shard in range(4):
        samples = [
            {"jpg": row["image"], "json": json.dumps({"ko": row["captions_ko"], "en": row["captions_en"]}).encode()}
            for row in rows[6 * shard : 6 * shard + 6]
        ]
        write_tar(folder / f"{shard}.tar", samples, first=6 * shard)
    (folder / "bert").mkdir()
    FAMILIES["bert"].write(folder / "bert")
    write_encoder(folder / "bert", "bert", len(AutoTokenizer.from_pretrained(folder / "bert")), hidden_dropout_prob=0.1)
    return folder


class Runs:
    """Runs of one method over one kind of source in a number of processes."""

    def __init__(self, place: Path, method: str, kind: str, processes: int) -> None:
        self._place, self._processes = place, processes
        encoder = "same" if method == "lora" else str(place / "bert")
        options = {
            "model.text_encoder": encoder,
            "data.num_crops": 2,
            "data.word_dropout": 0.2,
            "data.shuffle_buffer": 8,
            "train.ema_decay": 0.9,
            "train.num_steps": STEPS,
            "train.save_every": 2,
            "train.batch_size": 8 // processes,
            "resume": "auto",
        }
        if kind == "webdataset":
            captions = "{ko: json.ko, en: json.en}"
            options["data.sources"] = f"[{{path: '{place}/*.tar', image: jpg, captions: {captions}}}]"
            options |= {"data.num_workers": 2, "train.save_every": 1}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self._args = arguments(place / "source", place / "pairs.parquet", *words, *METHODS[method])

    def start(self, folder: Path, moment: str = "end") -> int | None:
        """Run in as many processes as asked for until the moment; kill what is left; return how the first ended."""
        command = [dying_alignments.__file__, moment, *self._args, "--output_dir", str(folder)]
        with folder.with_suffix(".log").open("a") as log:
            programs = start_in_processes(command, self._processes, log)
        return wait(programs, timeout=240)[0]

    def finish(self, folder: Path) -> tuple[bytes, list[tuple[int, float]]]:
        """Run to the end; return the model's bytes, and the loss of every step."""
        assert self.start(folder) == 0, folder.with_suffix(".log").read_text()[-3000:]
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return (folder / "model" / "model.safetensors").read_bytes(), [(line["step"], line["loss"]) for line in logged]


_undisturbed: dict[tuple[str, str, int], tuple[bytes, list[tuple[int, float]]]] = {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("method", "moments", "kind", "processes"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_killed_and_resumed_equals_undisturbed(
    method: str,
    moments: str,
    kind: str,
    processes: int,
    place: Path,
    tmp_path: Path,
) -> None:
    runs = Runs(place, method, kind, processes)
    reference = (method, kind, processes)
    if reference not in _undisturbed:
        _undisturbed[reference] = runs.finish(tmp_path / "undisturbed")
    for moment in moments.split():
        ended = runs.start(tmp_path / "killed", moment)
        assert ended == -9, (tmp_path / "killed.log").read_text()[-3000:]
        assert not (tmp_path / "killed" / "model").exists()
    weights, losses = runs.finish(tmp_path / "killed")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses == _undisturbed[reference][1]
    assert weights == _undisturbed[reference][0]
