"""The training steps, a generator that yields after each, and the request to stop it.

`koclip.runs.session` decides when to log, evaluate and save.
"""

import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from koclip import distributed
from koclip.data.batches import Batch
from koclip.losses import Loss, LossFn
from koclip.models.dual_encoder import DualEncoder
from koclip.models.stock import StockModel
from koclip.training import grad_cache
from koclip.training.health import Health

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
