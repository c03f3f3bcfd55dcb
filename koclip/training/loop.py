"""The training steps: a generator that yields after each, what keeps them healthy, and the request to stop.

`koclip.runs.session` decides when to log, evaluate and save.
"""

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import Any, NamedTuple

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
    """A step that went wrong, and the samples of its batch, of all processes."""

    step: int
    kind: str  # bad_step, overflow or spike
    loss: float
    grad_norm: float
    keys: list[str]


class DivergedError(RunError):
    """Too many steps in a row had no finite loss and gradient."""


@dataclass
class _Counts:
    """What a resumed run must remember."""

    bad_steps: int = 0
    in_a_row: int = 0
    good_steps: int = 0
    mean: float = 0.0
    variance: float = 0.0


@dataclass
class Health:
    """Judges every step.

    Args:
        max_bad_steps: Bad steps in a row after which the run stops.
        spike_sigmas: Standard deviations of the running loss above its mean at which a loss is a spike; 0: never.
    """

    max_bad_steps: int
    spike_sigmas: float
    counts: _Counts = field(default_factory=_Counts)
    events: list[Event] = field(default_factory=list)

    def judge(self, step: int, loss: float, grad_norm: float, keys: Sequence[str], loss_scale: float | None) -> bool:
        """Return whether the step may change the model. All processes must pass the same numbers.

        Args:
            step: Its number.
            loss: Mean over the processes.
            grad_norm: Norm of the global gradient.
            keys: This process's samples.
            loss_scale: That of fp16 training, None without. A gradient that overflows at a scale of 1 or more is how
                the scaler finds its scale: the step is skipped, but it does not count as bad.
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
                f"train.max_bad_steps: {self.counts.in_a_row} steps in a row had no finite loss and gradient; none of "
                "them changed the model. events.jsonl in the run directory lists them with their samples; mend these, "
                "or lower optim.lr (--resume auto --resume_with '[optim.lr]' goes on from the last checkpoint)"
            )

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must remember."""
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what `state_dict` returned."""
        self.counts = _Counts(**state)

    def _note_spike(self, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> None:
        """Compare a loss with the running mean, then add it to it (West 1979, exponentially weighted)."""
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
    """What a step changes. `model` and `optimizer` are as `accelerator.prepare` returned them."""

    accelerator: Accelerator
    model: nn.Module
    dual_encoder: DualEncoder  # the same, out of its distributed and compiled wrappers
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    loss: LossFn
    max_grad_norm: float
    num_pieces: int  # of every step's batch
    health: Health
    ema: AveragedModel | None = None

    @property
    def averaged(self) -> DualEncoder:
        """The model to evaluate and publish: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.dual_encoder  # type: ignore[return-value]

    @contextmanager
    def evaluating(self) -> Iterator[StockModel]:
        """Yield the stock model to evaluate. Sharded weights outside of the layers are whole meanwhile.

        Every process must evaluate the same data: FSDP2's layers are gathered from all of them.
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
    """Return an exponential moving average of `model` whose decay rises to `decay`, so that it forgets the start."""

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
    over all processes. Bad steps and spikes are in `state.health`.

    Args:
        state: What a step changes.
        batches: Pieces of batches, `state.num_pieces` to a step.
        start_step: Steps already done.
        num_steps: Steps in all.
        log_every: Steps between two stats.

    Raises:
        DivergedError: too many steps in a row had no finite loss and gradient; none of them changed the model.
    """
    window = _Window()
    state.model.train()
    for step in range(start_step + 1, num_steps + 1):
        began = time.perf_counter()
        pieces = list(itertools.islice(batches, state.num_pieces))
        window.waited += time.perf_counter() - began
        window.add(pieces, _step(state, step, pieces))
        if step % log_every == 0 or step == num_steps:
            yield step, window.summarize(state)
            window = _Window()
            state.model.train()  # an evaluation may have come between
        else:
            yield step, {}
        state.health.stop_if_diverged()


def progress_text(stats: dict[str, float]) -> str:
    """Return the stats that a progress bar has room for."""
    return (
        f"loss {stats['loss']:.3f}, accuracy {stats['accuracy']:.0%}, {stats['images_per_second']:,.0f} pairs/s, "
        f"{stats['memory_gib']:.1f} GiB"
    )


def _step(state: TrainState, step: int, pieces: Sequence[Batch]) -> dict[str, float]:
    """Do one optimizer step, unless its loss or gradient is not finite; return the step's numbers."""
    statistics = [buffer for buffer in state.dual_encoder.model.buffers() if buffer.is_floating_point()]  # batch norms
    kept = [buffer.clone() for buffer in statistics]
    loss = _backward(state, pieces)
    max_norm = state.max_grad_norm or float("inf")
    norm = state.accelerator.clip_grad_norm_(state.model.parameters(), max_norm)
    numbers = _numbers(state, loss, torch.as_tensor(norm))
    keys = [key for piece in pieces for key in piece.keys]
    scaler = state.accelerator.scaler
    scale = None if scaler is None else scaler.get_scale()
    good = state.health.judge(step, numbers["loss"], numbers["grad_norm"], keys, scale)
    if good or scaler is not None:  # the scaler skips what is not finite by itself, and learns from it
        state.optimizer.step()
    state.scheduler.step()
    state.optimizer.zero_grad()
    state.dual_encoder.clamp_logit_scale()
    if good and state.ema is not None:
        state.ema.update_parameters(state.dual_encoder)
    if not good:
        for buffer, before in zip(statistics, kept, strict=True):
            buffer.copy_(before)
    return numbers


def _backward(state: TrainState, pieces: Sequence[Batch]) -> Loss:
    """Accumulate the gradient of the loss over the batch that the pieces make up."""
    accelerator = state.accelerator
    if len(pieces) > 1:
        return grad_cache.backward(accelerator, state.model, state.dual_encoder, state.loss, pieces)
    batch = pieces[0].to(accelerator.device)
    loss = state.loss(state.model(**batch.inputs), *batch.targets)
    accelerator.backward(loss.value)
    return Loss(loss.value.detach(), loss.accuracy)


def _numbers(state: TrainState, loss: Loss, norm: torch.Tensor) -> dict[str, float]:
    """Return a step's numbers, means over the processes, so that all of these judge the step alike."""
    numbers = torch.stack([number.float().to(loss.value.device) for number in (*loss, norm)]).tolist()
    return distributed.mean(dict(zip(_MEANS, numbers, strict=True)), state.accelerator.device)


def _memory(device: torch.device) -> float:
    """Return the memory in use, GiB: the peak on a GPU; on a CPU what this process uses now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    held: int = psutil.Process().memory_info().rss
    return held / 2**30


@dataclass
class _Window:
    """Sums since the last logged step."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0
    num_pieces: int = 0
    padding: float = 0.0
    skipped: int = 0
    numbers: list[dict[str, float]] = field(default_factory=list)

    def add(self, pieces: Sequence[Batch], numbers: dict[str, float]) -> None:
        self.numbers.append(numbers)
        self.num_pieces += len(pieces)
        for piece in pieces:
            self.images += len(piece.keys)
            self.padding += piece.padding_share
            self.skipped += len(piece.skipped)

    def summarize(self, state: TrainState) -> dict[str, float]:
        """Return the stats; losses and gradient norms of steps that were skipped do not count."""
        seconds = time.perf_counter() - self.began
        device = state.accelerator.device
        local = {
            "data_wait_share": self.waited / seconds,
            "padding_share": self.padding / self.num_pieces,
            "images_per_second": self.images / seconds,
            "skipped": float(self.skipped),
            "memory_gib": _memory(device),
        }
        stats = distributed.mean(local, device)
        for total in ("images_per_second", "skipped"):
            stats[total] *= distributed.world_size()
        finite = [numbers for numbers in self.numbers if all(map(math.isfinite, numbers.values()))]
        means = {
            name: math.fsum(numbers[name] for numbers in finite) / len(finite) if finite else math.nan
            for name in _MEANS
        }
        return (
            means
            | stats
            | {
                "bad_steps": float(state.health.counts.bad_steps),
                "logit_scale": state.dual_encoder.logit_scale(),
                "lr": float(max(state.scheduler.get_last_lr())),
            }
        )


class StopRequest:
    """While entered, remembers that SIGTERM or SIGINT asked the run to stop; a second signal ends the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self) -> bool:
        """Return whether any process of the run was asked to stop; call it on all of them."""
        return distributed.any_process(self._asked, self._device)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
