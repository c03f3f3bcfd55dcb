"""The time in a run's log: that of all its processes, without the gaps between them and without what is done again."""

from pathlib import Path

import pytest
from test_checkpoints import open_run, prepare

from koclip import storage


class Clock:
    """A time that tests set, in the place of the run's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
        self.now = now
        monkeypatch.setattr("koclip.runs.directory.time.monotonic", lambda: self.now)


def seconds(folder: Path) -> list[float | None]:
    return [line.get("seconds") for line in storage.read_lines(folder / "metrics.jsonl")]


def test_seconds_of_killed_processes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, trainer = Clock(monkeypatch, 500.0), prepare()
    run = open_run(tmp_path, trainer)
    run.load(trainer)
    for step in (1, 2, 3, 4, 5):  # killed after step 5
        clock.now += 10
        run.log(step, {"loss": 1.0})
        if step == 3:
            run.save(trainer, step, keep=1, wait=True)
    for began in (9_000.0, 100.0):  # killed after step 4; then on a machine that has been booted
        clock.now = began
        run = open_run(tmp_path, trainer)
        clock.now += 2  # what comes before the first step
        assert run.load(trainer).step == 3
        clock.now += 5
        run.log(4, {"loss": 1.0})
    run.load(trainer, start=4)  # as the next stage does
    clock.now += 1
    run.log(5, {"loss": 1.0})
    assert seconds(tmp_path) == [10, 20, 30, 37, 38]


def test_a_run_killed_before_its_first_checkpoint_begins_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, trainer = Clock(monkeypatch, 500.0), prepare()
    for _ in range(2):
        run = open_run(tmp_path, trainer)
        run.load(trainer)
        clock.now += 4
        run.log(1, {"loss": 1.0})
    assert seconds(tmp_path) == [4]


def test_a_run_whose_log_has_no_seconds_gets_none(tmp_path: Path) -> None:
    trainer = prepare()
    open_run(tmp_path, trainer).save(trainer, 3, keep=1, wait=True)
    storage.append_lines(tmp_path / "metrics.jsonl", [{"step": 3, "loss": 1.0}])
    run = open_run(tmp_path, trainer)
    run.load(trainer)
    run.log(4, {"loss": 1.0})
    assert seconds(tmp_path) == [None, None]
