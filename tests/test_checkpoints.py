"""Checkpoints: whole or not there, damage is found, writing waits for nothing, changed configurations are refused."""

import dataclasses
import json
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_dual_encoder, tiny_pieces, tiny_tokenizer

from koclip import storage, training
from koclip.config import ConfigError, OptimConfig, PretrainConfig, RunError, TrainConfig, check_changes, to_dict
from koclip.losses import initial_bias
from koclip.models.dual_encoder import DualEncoder, from_scratch
from koclip.runs.checkpoints import Snapshot, read_facts
from koclip.runs.session import Session
from koclip.training import TrainState

CONFIG = PretrainConfig(
    train=TrainConfig(batch_size=4, num_steps=9, tracker="none", ema_decay=0.9), optim=OptimConfig(warmup_steps=1)
)


def prepare(config: PretrainConfig = CONFIG) -> TrainState:
    model = tiny_dual_encoder()
    return training.prepare(training.start(config.train), model, config)


def open_run(folder: Path, trainer: TrainState, config: PretrainConfig = CONFIG) -> Session:
    config = dataclasses.replace(config, output_dir=str(folder), resume="auto")
    return Session("test", config, trainer.accelerator)


def train(trainer: TrainState, start: int, stop: int) -> None:
    pieces = (piece for seed in range(start, stop) for piece in tiny_pieces([4], seed))
    for _ in training.steps(trainer, pieces, start, stop, log_every=100):
        pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    trainer = prepare()
    run = open_run(folder, trainer)
    for step in (1, 2, 3):
        train(trainer, step - 1, step)
        run.save(trainer, step, keep=5, wait=True)
    return folder


def truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def tear(file: Path, rng: random.Random) -> None:
    """The end never reached the disk: its blocks are zeros."""
    content = file.read_bytes()
    kept = rng.randrange(len(content))
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def delete_half(file: Path, rng: random.Random) -> None:
    files = sorted(file.parent.iterdir())
    for path in rng.sample(files, rng.randrange(1, len(files) + 1)):
        path.unlink()


DAMAGES = [truncate, tear, flip, delete, delete_half]


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_intact_checkpoint_is_resumed(
    saved: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 cases of a seeded fuzzer: one or two of the newest checkpoints damaged."""
    rng = random.Random(seed)
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    broken = [3] if rng.random() < 0.7 else [3, 2]
    for step in broken:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        DAMAGES[seed % len(DAMAGES)](rng.choice(sorted(checkpoint.iterdir())), rng)
    trainer = prepare()
    progress = open_run(folder, trainer).load(trainer)
    assert progress.step == min(broken) - 1
    said = capsys.readouterr().out
    for step in broken:
        assert f"step-{step:08d} is damaged" in said
        assert (folder / "checkpoints" / f"damaged-step-{step:08d}").is_dir()


def test_intact_checkpoints_are_not_damaged(saved: Path) -> None:
    for checkpoint in sorted((saved / "checkpoints").glob("step-*")):
        assert storage.damage(checkpoint) is None


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for file in (folder / "checkpoints").rglob("state.safetensors"):
        file.write_bytes(b"")
    for _ in range(2):  # the second time they are already out of the way
        with pytest.raises(RunError, match=r"resume: .*damaged-step-00000003"):
            open_run(folder, prepare())
    assert len(list((folder / "checkpoints").glob("damaged-step-*"))) == 3


def test_what_was_half_written_or_half_deleted_is_cleared_away(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "writing-step-00000004")
    (checkpoints / "step-00000001").rename(checkpoints / "deleting-step-00000001")
    trainer = prepare()
    assert open_run(folder, trainer).load(trainer).step == 3
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_full_disk_leaves_the_checkpoints_before(saved: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 10 kB to a file."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    trainer = prepare()
    run = open_run(folder, trainer)
    run.load(trainer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match=r"step-00000004.*--resume auto"):
            run.save(trainer, 4, keep=1, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (1, 2, 3)}
    again = prepare()
    assert open_run(folder, again).load(again).step == 3


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing a checkpoint takes until the event is set."""
    released = threading.Event()
    write: Callable[[Snapshot, Path], None] = Snapshot.write

    def wait_and_write(snapshot: Snapshot, directory: Path) -> None:
        assert released.wait(60)
        write(snapshot, directory)

    monkeypatch.setattr(Snapshot, "write", wait_and_write)
    return released


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, slow_disk: threading.Event) -> None:
    trainer = prepare()
    run = open_run(tmp_path, trainer)
    train(trainer, 0, 2)
    then = {name: value.clone() for name, value in trainer.dual_encoder.state_dict().items()}
    average = {name: value.clone() for name, value in trainer.averaged.state_dict().items()}
    run.save(trainer, 2, keep=1)  # returns at once
    train(trainer, 2, 4)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    slow_disk.set()
    run.save(trainer, 4, keep=5, wait=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    again = prepare()
    assert open_run(tmp_path, again).load(again).step == 2
    assert all(torch.equal(value, then[name]) for name, value in again.dual_encoder.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in again.averaged.state_dict().items())


def test_a_failed_write_stops_the_run_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(snapshot: Snapshot, directory: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", fail)
    trainer = prepare()
    run = open_run(tmp_path, trainer)
    run.save(trainer, 1, keep=1)

    def go_on() -> None:
        for _ in range(10_000):
            run.checkpoints.stop_if_failed()
            time.sleep(0.001)

    with pytest.raises(RunError, match="No space left on device"):
        go_on()


def test_only_the_newest_are_kept(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    trainer = prepare()
    run = open_run(folder, trainer)
    run.save(trainer, 4, keep=2, wait=True)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    storage.append_lines(log, [{"step": 1}, {"step": 2}])
    log.write_text(log.read_text() + '{"step": 3, "lo')
    assert storage.read_lines(log) == [{"step": 1}, {"step": 2}]
    storage.keep_lines(log, lambda item: item["step"] < 2)
    assert log.read_text() == '{"step": 1}\n'


def test_a_line_break_of_unicode_is_part_of_its_item(tmp_path: Path) -> None:
    items = [{"key": "a\u2028b"}, {"key": "c\x85d\n\r"}]
    storage.append_lines(tmp_path / "skipped.jsonl", items)
    assert storage.read_lines(tmp_path / "skipped.jsonl") == items


def test_a_run_killed_before_its_first_checkpoint_begins_its_logs_anew(tmp_path: Path) -> None:
    storage.append_lines(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    trainer = prepare()
    assert open_run(tmp_path, trainer).load(trainer).step == 0
    assert storage.read_lines(tmp_path / "metrics.jsonl") == []


def changed(**sections: dict[str, object]) -> PretrainConfig:
    parts = {name: dataclasses.replace(getattr(CONFIG, name), **values) for name, values in sections.items()}  # type: ignore[arg-type]
    return dataclasses.replace(CONFIG, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (changed(data={"seed": 1}), r"data\.seed: 0 -> 1"),
        (changed(optim={"lr": 0.5}), r"optim\.lr: 0\.001 -> 0\.5"),
        (changed(train={"batch_size": 8}), r"global batch .*: 4 -> 8"),
    ],
)
def test_changes_of_the_result_are_refused_before_anything_is_written(
    saved: Path, config: PretrainConfig, key: str
) -> None:
    before = (saved / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=f"{key}.*--resume_with"):
        open_run(saved, prepare(config), config)
    assert (saved / "config.yaml").read_text() == before


def test_a_change_accepted_by_name_takes_effect(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(changed(optim={"lr": 0.5}, train={"log_every": 7}), resume_with=("optim.lr",))
    trainer = prepare(config)
    open_run(saved, trainer, config).load(trainer)
    said = capsys.readouterr().out
    assert "optim.lr: 0.001 -> 0.5" in said
    assert "train.log_every: 50 -> 7" in said
    old = prepare()
    open_run(saved, old).load(old)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(500 * old.optimizer.param_groups[0]["lr"])


def test_an_average_that_is_turned_on_begins_with_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """It is refused unless it is named; then the average is the model's weights until the first step."""
    without = changed(train={"ema_decay": 0.0})
    trainer = prepare(without)
    run = open_run(tmp_path, trainer, without)
    train(trainer, 0, 2)
    run.save(trainer, 2, keep=1, wait=True)
    with pytest.raises(ConfigError, match=r"train\.ema_decay: 0\.0 -> 0\.9"):
        open_run(tmp_path, prepare())
    named = dataclasses.replace(CONFIG, resume_with=("train.ema_decay",))
    again = prepare(named)
    assert open_run(tmp_path, again, named).load(again).step == 2
    weights = trainer.dual_encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.averaged.state_dict().items())
    train(again, 2, 4)
    differing = [
        n
        for n, value in again.averaged.state_dict().items()
        if not torch.equal(value, again.dual_encoder.state_dict()[n])
    ]
    assert differing


def test_an_average_may_be_turned_off_by_name(saved: Path) -> None:
    config = dataclasses.replace(changed(train={"ema_decay": 0.0}), resume_with=("train.ema_decay",))
    trainer = prepare(config)
    assert open_run(saved, trainer, config).load(trainer).step == 3
    assert trainer.ema is None


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"text_width": 32}}, "model.text_width"),
        ({"model": {"text_layers": 1}}, "model.text_layers"),
        ({"loss": {"name": "sigmoid"}}, "loss.name"),
    ],
)
def test_a_change_that_no_checkpoint_can_carry_is_refused_even_if_it_is_named(
    saved: Path, sections: dict[str, dict[str, object]], key: str
) -> None:
    config = dataclasses.replace(changed(**sections), resume_with=(key,))
    model = DualEncoder(
        *from_scratch(tiny_config(**sections.get("model", {})), tiny_tokenizer()), initial_bias(config.loss)
    )
    trainer = training.prepare(training.start(config.train), model, config)
    with pytest.raises(ConfigError, match="does not fit"):
        open_run(saved, trainer, config).load(trainer)


def test_a_place_in_a_stream_that_counts_batches_is_refused(saved: Path, tmp_path: Path) -> None:
    """As an older koclip wrote it."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    checkpoint = folder / "checkpoints" / "step-00000003"
    facts = read_facts(checkpoint) | {"positions": [[[0, 24, 2, [[0, 24]]]]]}
    (checkpoint / "state.json").write_text(json.dumps(facts), encoding="utf-8")
    (checkpoint / storage.SEAL).unlink()
    storage.seal(checkpoint)
    trainer = prepare()
    with pytest.raises(ConfigError, match=r"resume: .*older koclip"):
        open_run(folder, trainer).load(trainer)


def test_another_number_of_processes_may_go_on_with_the_same_global_batch() -> None:
    before, now = to_dict(CONFIG), to_dict(changed(train={"batch_size": 8}))
    assert check_changes(before, now, (2, 1), ()) == []
    with pytest.raises(ConfigError, match=r"global batch .*: 8 -> 4"):
        check_changes(before, before, (2, 1), ())
    assert len(check_changes(before, before, (2, 1), ("train.batch_size",))) == 1


def test_an_unknown_name_of_a_change_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resume_with: got 'optim\.rate'"):
        check_changes(to_dict(CONFIG), to_dict(CONFIG), (1, 1), ("optim.rate",))
