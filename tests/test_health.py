"""Bad steps never change the model, on no process; they are listed with their samples, and too many stop the run."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from tiny import tiny_dual_encoder, tiny_pieces
from torch import Tensor, nn

from koclip import training
from koclip.config import OptimConfig, PretrainConfig, TrainConfig
from koclip.data.batches import Batch
from koclip.models.dual_encoder import DualEncoder
from koclip.runs.session import Session
from koclip.training import DivergedError, TrainState
from koclip.training.loop import Counts, Health

CONFIG = PretrainConfig(
    train=TrainConfig(batch_size=4, num_steps=30, tracker="none", max_bad_steps=10, ema_decay=0.9),
    optim=OptimConfig(warmup_steps=1),
)
NAN, INF = float("nan"), float("inf")


def prepare(config: PretrainConfig = CONFIG, model: DualEncoder | None = None) -> TrainState:
    return training.prepare(training.start(config.train), model or tiny_dual_encoder(), config)


def pieces(bad: set[int], stop: int = 30, sizes: tuple[int, ...] = (4,), value: float = NAN) -> Iterator[Batch]:
    """Batches of steps 1 to `stop`; those of `bad` steps have one picture of `value`s."""
    for step in range(1, stop + 1):
        batches = tiny_pieces(list(sizes), seed=step)
        if step in bad:
            pixels = batches[-1].pixel_values.float()
            pixels[0] = value
            object.__setattr__(batches[-1], "pixel_values", pixels)
        yield from batches


def tensors(trainer: TrainState) -> dict[str, Tensor]:
    values = {f"model.{name}": value for name, value in trainer.dual_encoder.state_dict().items()}
    values |= {f"ema.{name}": value for name, value in trainer.averaged.state_dict().items()}
    for number, state in enumerate(trainer.optimizer.state_dict()["state"].values()):
        values |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return {name: value.clone() for name, value in values.items()}


def all_finite(trainer: TrainState) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors(trainer).values())


@pytest.mark.parametrize("sizes", [(4,), (3, 1)], ids=["whole", "pieces"])
def test_one_nan_batch_changes_nothing_and_is_listed(sizes: tuple[int, ...], tmp_path: Path) -> None:
    micro = None if len(sizes) == 1 else sizes[0]
    config = PretrainConfig(
        train=TrainConfig(batch_size=4, micro_batch_size=micro, num_steps=30, tracker="none", ema_decay=0.9),
        optim=OptimConfig(warmup_steps=1),
    )
    trainer = prepare(config)
    run = Session("test", dataclasses.replace(config, output_dir=str(tmp_path)), trainer.accelerator)
    before: dict[str, Tensor] = {}
    for step, stats in training.steps(trainer, pieces({7}, sizes=sizes), 0, 30, log_every=10):
        run.directory.list_events(trainer.health.take_events())
        if stats:
            assert math.isfinite(stats["loss"])
            assert stats["bad_steps"] == 1
        if step == 6:
            before = tensors(trainer)
        if step == 7:
            assert all(torch.equal(value, before[name]) for name, value in tensors(trainer).items())
    assert all_finite(trainer)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["kind"], event["loss"]) == (7, "bad_step", "nan")
    assert event["keys"] == [key for piece in tiny_pieces(list(sizes), 7) for key in piece.keys]


def test_an_infinite_gradient_of_a_finite_loss_is_a_bad_step() -> None:
    trainer = prepare()

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * INF

    hook = trainer.dual_encoder.model.text_projection.register_forward_hook(lambda *args: Explode.apply(args[2]))
    before = tensors(trainer)
    list(training.steps(trainer, pieces(set(), 1), 0, 1, log_every=1))
    assert [event.kind for event in trainer.health.take_events()] == ["bad_step"]
    after = tensors(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    hook.remove()


def test_ten_in_a_row_stop_the_run_and_the_last_good_checkpoint_loads(tmp_path: Path) -> None:
    trainer = prepare()
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path))
    run = Session("test", config, trainer.accelerator)
    seen: dict[int, dict[str, Tensor]] = {}

    def train() -> None:
        for step, _ in training.steps(trainer, pieces(set(range(9, 31))), 0, 30, log_every=10):
            seen[step] = tensors(trainer)
            run.directory.list_events(trainer.health.take_events())
            if step % 4 == 0:
                run.save(trainer, step, keep=5, wait=True)

    with pytest.raises(DivergedError, match=r"10 .*events\.jsonl"):
        train()
    assert max(seen) == 18
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 10
    again = prepare()
    run = Session("test", dataclasses.replace(config, resume="auto"), again.accelerator)
    assert run.load(again).step == 16  # saved among the bad steps, and as good as before them
    assert all(torch.equal(value, seen[8][name]) for name, value in tensors(again).items())
    assert again.health.counts.in_a_row == 8


def test_nine_in_a_row_do_not_stop_the_run() -> None:
    trainer = prepare()
    for _ in training.steps(trainer, pieces(set(range(9, 18))), 0, 30, log_every=30):
        pass
    assert trainer.health.counts.bad_steps == 9
    assert all_finite(trainer)


def test_running_statistics_of_a_bad_batch_are_undone() -> None:
    model = tiny_dual_encoder()
    model.model.visual_projection = nn.Sequential(model.model.visual_projection, nn.BatchNorm1d(32))
    trainer = prepare(model=model)
    list(training.steps(trainer, pieces({2}, 3), 0, 3, log_every=3))
    statistics = trainer.dual_encoder.model.visual_projection[1]
    assert statistics.running_mean.isfinite().all()
    assert statistics.running_mean.abs().sum() > 0  # the good batches did reach it


def test_fp16_overflow_adapts_the_scale_and_a_nan_batch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler of fp16 training, on a CPU: a scale that is too large is no bad step, nan in the data is one."""
    trainer = prepare()
    accelerator = trainer.accelerator
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    accelerator.scaler, accelerator.native_amp = scaler, True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [trainer.optimizer]
    for _ in training.steps(trainer, pieces({20}), 0, 30, log_every=30):
        pass
    kinds = [event.kind for event in trainer.health.take_events()]
    assert kinds.count("bad_step") == 1
    assert 0 < kinds.count("overflow") < 19
    assert scaler.get_scale() < 2.0**127
    assert all_finite(trainer)


def test_a_spike_is_noted_and_noise_is_not() -> None:
    health = Health(max_bad_steps=10, spike_sigmas=6)
    noise = torch.Generator().manual_seed(0)
    losses = [2 + 0.1 * torch.randn((), generator=noise).item() for _ in range(1_000)]
    losses[500] = 3.5
    for step, loss in enumerate(losses):
        assert health.judge(step, loss, 1.0, [f"sample {step}"], None)
    assert [(event.step, event.kind, event.keys) for event in health.take_events()] == [(500, "spike", ["sample 500"])]
    assert not health.take_events()


def test_the_state_of_a_judge_survives_a_checkpoint() -> None:
    health = Health(max_bad_steps=3, spike_sigmas=6)
    for step, loss in enumerate(itertools.chain([1.0] * 5, [NAN, NAN])):
        health.judge(step, loss, 1.0, [], None)
    saved = json.loads(json.dumps(dataclasses.asdict(health.counts)))
    again = Health(max_bad_steps=3, spike_sigmas=6, counts=Counts(**saved))
    again.stop_if_diverged()
    again.judge(7, NAN, 1.0, [], None)
    with pytest.raises(DivergedError):
        again.stop_if_diverged()
