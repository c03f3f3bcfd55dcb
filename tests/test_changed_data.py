"""A run that goes on notices that its data is not what it was, and goes on with it only if that is accepted by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from align_runs import align, arguments, write_pairs, write_source

from koclip import storage
from koclip.config import ConfigError

STEPS = 2
Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
CHANGES: dict[str, Change] = {
    "none": lambda rows: rows,
    "grown": lambda rows: [*rows, rows[0]],
    "cut": lambda rows: rows[:-1],
    "reordered": lambda rows: rows[::-1],
    "caption": lambda rows: [{**rows[0], "captions_ko": ["다른 사진"]}, *rows[1:]],
    "picture": lambda rows: [{**rows[0], "image": rows[0]["image"] + b"\0"}, *rows[1:]],
}


@pytest.fixture(scope="module", params=[False, True], ids=["stored", "streamed"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a table, which is stored or streamed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("changed")
        write_source(folder / "source")
        write_pairs(folder / "pairs.parquet")
        (folder / "streaming").write_text(json.dumps(request.param))
        train(folder, "--train.num_steps", str(STEPS))
        shutil.copytree(folder, folder.with_name(f"{folder.name}-kept"))
    return folder


def train(folder: Path, *args: str) -> None:
    streaming = json.loads((folder / "streaming").read_text())
    source = f"path: {folder / 'pairs.parquet'}, streaming: {str(streaming).lower()}"
    sources = f"[{{{source}, captions: {{ko: captions_ko, en: captions_en}}}}]"
    rest = ["--data.sources", sources, "--eval.sets", "[]", "--align.cache", "false", "--data.num_crops", "0"]
    rest += ["--align.method", "full", "--output_dir", str(folder / "run")]
    align(*arguments(folder / "source", folder / "pairs.parquet", *rest, *args))


@pytest.fixture
def stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as it was when it stopped."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.rmtree(place)
    shutil.copytree(place.with_name(f"{place.name}-kept"), place)
    return place


def go_on(folder: Path, *named: str) -> list[int]:
    """Go on for a step and return the steps that were logged."""
    accepted = f"[{', '.join(['train.num_steps', *named])}]"
    train(folder, "--train.num_steps", str(STEPS + 1), "--resume", "auto", "--resume_with", accepted)
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def change(folder: Path, name: str) -> None:
    rows = CHANGES[name](pq.read_table(folder / "pairs.parquet").to_pylist())
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "none"])
def test_changed_data_is_refused_and_accepted_by_name(
    name: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint and the logs are as they were until it is accepted."""
    change(stopped, name)
    with pytest.raises(ConfigError, match=r"resume: .*source pairs: .*data\.sources"):
        go_on(stopped)
    assert go_on(stopped, "data.sources") == [1, 2, 3]
    said = capsys.readouterr().out
    assert "source pairs: " in said


def test_data_that_was_written_again_goes_on(stopped: Path) -> None:
    """The same rows in another file of the same name, with another time stamp."""
    change(stopped, "none")
    assert go_on(stopped) == [1, 2, 3]


def test_a_checkpoint_that_does_not_know_its_data_says_so(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = stopped / "run" / "checkpoints" / "step-00000002"
    facts = json.loads((checkpoint / "state.json").read_text())
    del facts["data"]
    (checkpoint / "state.json").write_text(json.dumps(facts))
    (checkpoint / storage.SEAL).unlink()
    storage.seal(checkpoint)
    assert go_on(stopped) == [1, 2, 3]
    assert "the checkpoint does not describe its data" in capsys.readouterr().out
