"""The training loop: a generator of optimizer steps, the checks of each step, and the request to stop.

`koclip.runs.session` decides when to log, evaluate and save.
"""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from koclip import distributed
from koclip.config import RunError
from koclip.data.batches import Batch
from koclip.losses import Loss, LossFn
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import StockModel
from koclip.training import grad_cache

_DECAY = 0.98  # of the running mean and variance of the loss: about 50 steps
_MIN_STEPS = 100  # good steps before a spike can be distinguished from noise


class Event(NamedTuple):
    """A bad step or a loss spike, with the samples of its batch from all processes."""

    step: int
    kind: str  # bad_step, overflow or spike
    loss: float
    grad_norm: float
    keys: list[str]


class DivergedError(RunError):
    """Too many steps in a row had no finite loss and gradient."""


@dataclass
class Counts:
    """The part of `Health` that a checkpoint saves."""

    bad_steps: int = 0
    in_a_row: int = 0
    good_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0


@dataclass
class Health:
    """Rejects steps whose loss or gradient is not finite, and records loss spikes."""

    max_bad_steps: int  # the run stops after this many bad steps in a row
    spike_sigmas: float  # a spike is this many standard deviations above the running mean of the loss; 0: no spikes
    counts: Counts = field(default_factory=Counts)
    events: list[Event] = field(default_factory=list)

    def judge(self, step: int, loss: float, grad_norm: float, keys: Sequence[str], loss_scale: float | None) -> bool:
        """Return whether this step may change the model.

        All processes must pass the same `loss` (their mean) and `grad_norm` (of the global gradient). `keys` are this
        process's samples. `loss_scale` is that of fp16 training, else None. The scaler finds its scale by trying. So a
        gradient that overflows at a scale of 1 or more skips the step, but does not count as a bad step.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._note_spike(step, loss, grad_norm, keys)
            self.counts.in_a_row = 0
            return True
        if math.isfinite(loss) and loss_scale is not None and loss_scale >= 1:
            self._note(step, "overflow", loss, grad_norm, keys)
            return False
        self.counts.bad_steps += 1
        self.counts.in_a_row += 1
        self._note(step, "bad_step", loss, grad_norm, keys)
        return False

    def stop_if_diverged(self) -> None:
        """Raise a `DivergedError` after `max_bad_steps` bad steps in a row."""
        if self.counts.in_a_row >= self.max_bad_steps:
            raise DivergedError(
                f"train.max_bad_steps: got {self.counts.in_a_row} steps in a row without a finite loss and gradient; "
                "the model was not changed. events.jsonl in the run directory lists the steps and their samples: "
                "correct or remove these samples, or lower optim.lr and continue from the last checkpoint with "
                "--resume auto --resume_with '[optim.lr]'"
            )

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken

    def _note_spike(self, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        """Compare the loss with the running mean and variance, then update them (West 1979, exponential weights)."""
        counts = self.counts
        limit = counts.mean + self.spike_sigmas * math.sqrt(counts.variance)
        if self.spike_sigmas and counts.good_steps >= _MIN_STEPS and loss > limit:
            self._note(step, "spike", loss, grad_norm, keys)
        weight = max(1 - _DECAY, 1 / (counts.good_steps + 1))
        difference = loss - counts.mean
        counts.mean += weight * difference
        counts.variance = (1 - weight) * (counts.variance + weight * difference**2)
        counts.good_steps += 1

    def _note(self, step: int, kind: str, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        everyone = [key for part in distributed.gather_objects(list(keys)) for key in part]
        self.events.append(Event(step, kind, loss, grad_norm, everyone))


_MEANS = ("loss", "accuracy", "grad_norm")


@dataclass
class TrainState:
    """Everything that a training step reads and changes."""

    accelerator: Accelerator
    model: nn.Module  # wrapped by `accelerator.prepare`
    dual_encoder: DualEncoder  # the same model without its distributed and compiled wrappers
    optimizer: torch.optim.Optimizer  # wrapped by `accelerator.prepare`
    scheduler: LambdaLR
    loss: LossFn
    max_grad_norm: float
    num_micro_batches: int  # per step
    health: Health
    ema: AveragedModel | None = None

    @property
    def averaged(self) -> DualEncoder:
        """The model to evaluate and publish: the moving average, if the run keeps one."""
        return self.ema.module if self.ema is not None else self.dual_encoder  # type: ignore[return-value]

    @contextmanager
    def evaluating(self) -> Iterator[StockModel]:
        """Yield the stock model to evaluate; under FSDP2, gather the weights that belong to no layer.

        Every process must evaluate the same data, because FSDP2 gathers each layer from all processes.
        """
        sharded = self.model if isinstance(self.model, FSDPModule) else None
        if sharded:
            sharded.unshard()
        try:
            yield self.averaged.model
        finally:
            if sharded:
                sharded.reshard()


def ema_of(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of `model`. Its decay rises to `decay`, so early weights count little."""

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return AveragedModel(model, multi_avg_fn=average)  # type: ignore[arg-type]


def steps(
    state: TrainState, batches: Iterator[Batch], start_step: int, num_steps: int, log_every: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from `start_step` to `num_steps` and yield (step, stats) after every step.

    `stats` is empty except every `log_every` steps and at the last step; then it holds means since the previous report,
    over all processes. Bad steps and spikes are in `state.health`. `batches` yields micro-batches; each step takes
    `state.num_micro_batches` of them.

    Raises:
        DivergedError: too many steps in a row had no finite loss and gradient; none of them changed the model.
    """
    window = _Window()
    state.model.train()
    for step in range(start_step + 1, num_steps + 1):
        began = time.perf_counter()
        micro_batches = list(itertools.islice(batches, state.num_micro_batches))
        window.waited += time.perf_counter() - began
        window.add(micro_batches, _step(state, step, micro_batches))
        if step % log_every == 0 or step == num_steps:
            yield step, window.summarize(state)
            window = _Window()
            state.model.train()  # the caller may have evaluated the model
        else:
            yield step, {}
        state.health.stop_if_diverged()


def _step(state: TrainState, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """Do one optimizer step, unless its loss or gradient is not finite; return loss, accuracy and gradient norm."""
    statistics = [buffer for buffer in state.dual_encoder.model.buffers() if buffer.is_floating_point()]  # batch norms
    before = [buffer.clone() for buffer in statistics]
    loss = _backward(state, micro_batches)
    norm = state.accelerator.clip_grad_norm_(state.model.parameters(), state.max_grad_norm or math.inf)
    # Means over the processes: every process must judge the step alike.
    values = torch.stack([value.float().to(loss.value.device) for value in (*loss, torch.as_tensor(norm))]).tolist()
    numbers = distributed.mean(dict(zip(_MEANS, values, strict=True)), state.accelerator.device)
    keys = [key for batch in micro_batches for key in batch.keys]
    scaler = state.accelerator.scaler
    scale = None if scaler is None else scaler.get_scale()
    good = state.health.judge(step, numbers["loss"], numbers["grad_norm"], keys, scale)
    if good or scaler is not None:  # the scaler skips such steps by itself, and adapts its scale
        state.optimizer.step()
    state.scheduler.step()
    state.optimizer.zero_grad()
    state.dual_encoder.clamp_logit_scale()
    if good and state.ema is not None:
        state.ema.update_parameters(state.dual_encoder)
    if not good:
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
    return numbers


def _backward(state: TrainState, micro_batches: Sequence[Batch]) -> Loss:
    """Accumulate the gradient of the loss over the whole batch."""
    accelerator = state.accelerator
    if len(micro_batches) > 1:
        return grad_cache.backward(accelerator, state.model, state.dual_encoder, state.loss, micro_batches)
    batch = micro_batches[0].to(accelerator.device)
    loss = state.loss(state.model(**batch.inputs), *batch.targets)
    accelerator.backward(loss.value)
    return Loss(loss.value.detach(), loss.accuracy)


def _memory(device: torch.device) -> float:
    """Return memory in GiB: on a GPU the peak, on a CPU the current use of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss / 2**30)


@dataclass
class _Window:
    """Sums since the last logged step."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0
    num_batches: int = 0
    padding: float = 0.0
    skipped: int = 0
    numbers: list[dict[str, float]] = field(default_factory=list)

    def add(self, micro_batches: Sequence[Batch], numbers: dict[str, float]) -> None:
        self.numbers.append(numbers)
        self.num_batches += len(micro_batches)
        for batch in micro_batches:
            self.images += len(batch.keys)
            self.padding += batch.padding_share
            self.skipped += len(batch.skipped)

    def summarize(self, state: TrainState) -> dict[str, float]:
        """Return the stats. The means leave out steps whose loss or gradient was not finite."""
        seconds = time.perf_counter() - self.began
        device = state.accelerator.device
        local = {
            "data_wait_share": self.waited / seconds,
            "padding_share": self.padding / self.num_batches,
            "images_per_second": self.images / seconds,
            "skipped": float(self.skipped),
            "memory_gib": _memory(device),
        }
        stats = distributed.mean(local, device)
        for total in ("images_per_second", "skipped"):
            stats[total] *= distributed.world_size()
        finite = [numbers for numbers in self.numbers if all(map(math.isfinite, numbers.values()))]
        sums = {name: math.fsum(numbers[name] for numbers in finite) for name in _MEANS}
        return {
            **{name: total / len(finite) if finite else math.nan for name, total in sums.items()},
            **stats,
            "bad_steps": float(state.health.counts.bad_steps),
            "logit_scale": state.dual_encoder.logit_scale(),
            "lr": float(max(state.scheduler.get_last_lr())),
        }


@contextmanager
def stop_requests(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Let the first SIGTERM or SIGINT only ask the run to stop; a second signal ends the process.

    Yields a function that returns whether any process of the run was asked to stop. Call it on every process.
    """
    received = False

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        restore()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: distributed.any_process(received, device)
    finally:
        restore()
