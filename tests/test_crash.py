"""Runs killed with SIGKILL at random moments and resumed end with the bits of the run that nobody disturbed.

Parquet, WebDataset shards and streamed parquet, in one and two processes, during steps and during saves, once or twice
in a row. `test_crash_points` dies in every file operation of a save.
"""

import contextlib
import io
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
from helpers.warm_python import Program, start_in_processes, wait
from PIL import Image
from sources_on_disk import write_tar

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain.py"
NUM_STEPS, SAVE_EVERY = 60, 2  # a save is nearly always under way
ROWS, SHARDS = 96, 4


class Kind(NamedTuple):
    """A source and a number of processes."""

    source: str
    processes: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.processes}"


CASES = [(Kind("parquet", 1), 0), (Kind("webdataset", 2), 3), (Kind("streaming", 1), 4)]  # with a seed of the moments


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (number * 37 % 256, number * 91 % 256, number * 13 % 256)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in files that are drawn from at random, in tar shards, and in shards that are streamed."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"image": picture(n), "caption": f"{n}번 그림, {n * 7}"} for n in range(ROWS)]
    size = ROWS // SHARDS
    for shard in range(SHARDS):
        part = rows[shard * size : (shard + 1) * size]
        datasets.Dataset.from_list(part).to_parquet(folder / f"{shard}.parquet")
        samples = [{"png": row["image"], "txt": str(row["caption"]).encode()} for row in part]
        write_tar(folder / f"{shard}.tar", samples, first=shard * size)  # type: ignore[arg-type]
    column = {"image": "image", "captions": {"ko": "caption"}}
    return {
        "parquet": json.dumps([{"path": f"{folder}/*.parquet", **column}]),
        "streaming": json.dumps([{"path": f"{folder}/*.parquet", "streaming": True, **column}]),
        "webdataset": json.dumps([{"path": f"{folder}/*.tar", "image": "png", "captions": {"ko": "txt"}}]),
    }


def words(kind: Kind, sources: dict[str, str], run: Path, seed: int) -> list[str]:
    """Return the options of a run, which is resumed if it exists."""
    options = {
        "data.sources": sources[kind.source],
        "data.shuffle_buffer": 16,
        "data.num_workers": seed % 2,
        "data.word_dropout": 0.2,
        "train.num_steps": NUM_STEPS,
        "train.save_every": SAVE_EVERY,
        "train.batch_size": 8 // kind.processes,
        "train.num_threads": 1,
        "train.tracker": "none",
        "train.log_every": 1,
        "train.ema_decay": 0.9,
        "optim.warmup_steps": 3,
        "tokenizer.vocab_size": 560,
        "model.image_size": 24,
        "model.image_width": 32,
        "model.text_width": 32,
        "model.image_layers": 1,
        "model.patch_dropout": 0.3,
        "eval.sets": "[{source: {scenes_part: test, scenes_size: 4}}]",
        "resume": "auto",
        "output_dir": str(run),
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def start(kind: Kind, sources: dict[str, str], run: Path, seed: int) -> list[Program]:
    """Launch or resume a run."""
    command = [str(RECIPE), *words(kind, sources, run, seed)]
    with (run.parent / f"{run.name}.log").open("a") as log:
        return start_in_processes(command, kind.processes, log, run.parent)


def finish(processes: list[Program], run: Path) -> bytes:
    assert set(wait(processes, timeout=300)) == {0}, (run.parent / f"{run.name}.log").read_text()[-3000:]
    return (run / "model" / "model.safetensors").read_bytes()


def trained(run: Path) -> int:
    """Return how many steps a run has logged."""
    with contextlib.suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    return 0


def kill_while_training(processes: list[Program], run: Path, rng: random.Random) -> None:
    """Kill all processes: either between two random steps or while a checkpoint is being written."""
    wanted, during_save = trained(run) + rng.randrange(1, NUM_STEPS // 3), rng.random() < 0.5
    give_up = time.time() + 240
    while processes[0].poll() is None and time.time() < give_up:
        saving = not during_save or next((run / "checkpoints").glob("writing-*"), None) is not None
        if trained(run) >= wanted and saving:
            break
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(timeout=60)


_undisturbed: dict[tuple[Kind, int], bytes] = {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "seed"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in CASES])
def test_killed_and_resumed_equals_undisturbed(kind: Kind, seed: int, sources: dict[str, str], tmp_path: Path) -> None:
    reference = (kind, seed % 2)
    if reference not in _undisturbed:
        run = tmp_path / "undisturbed"
        _undisturbed[reference] = finish(start(kind, sources, run, seed), run)
    rng = random.Random(seed)
    run, began = tmp_path / "killed", time.monotonic()
    for _ in range(rng.choice([1, 1, 2])):
        kill_while_training(start(kind, sources, run, seed), run, rng)
        assert not (run / "model").exists()
    assert finish(start(kind, sources, run, seed), run) == _undisturbed[reference]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, NUM_STEPS + 1))
    seconds = [line["seconds"] for line in logged]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < time.monotonic() - began


@pytest.mark.timeout(900)
def test_one_process_goes_on_where_two_stopped(sources: dict[str, str], tmp_path: Path) -> None:
    """The global batches are the same ones, in the same order; only the dropout of patches draws other numbers."""
    run = tmp_path / "run"
    two, alone = Kind("parquet", 2), Kind("parquet", 1)
    kill_while_training(start(two, sources, run, 0), run, random.Random(1))
    finish(start(alone, sources, run, 0), run)
    assert "processes: 2 -> 1" in (tmp_path / "run.log").read_text()
    assert trained(run) == NUM_STEPS
