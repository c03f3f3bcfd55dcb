"""The training loop: a generator that yields after every step. When to log, evaluate and save is the recipe's."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from koclip import distributed
from koclip.data.batches import Batch
from koclip.losses import LossFn
from koclip.models import StockModel
from koclip.models.dual_encoder import DualEncoder


@dataclass
class Trainer:
    """What a step changes. `model` and `optimizer` are as `accelerator.prepare` returned them."""

    accelerator: Accelerator
    model: nn.Module
    dual_encoder: DualEncoder  # the same, out of its distributed and compiled wrappers
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    loss: LossFn
    max_grad_norm: float
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
    trainer: Trainer, batches: Iterator[Batch], start_step: int, num_steps: int, log_every: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from `start_step` to `num_steps` and yield (step, stats) after every step.

    Stats are empty but every `log_every` steps and at the end, when they hold means over the steps since the last
    ones and over all processes: reading a number from a GPU would hold it up.
    """
    window = _Window()
    trainer.model.train()
    for step in range(start_step + 1, num_steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        window.waited += time.perf_counter() - began
        window.add(batch, *_step(trainer, batch.to(trainer.accelerator.device)))
        if step % log_every == 0 or step == num_steps:
            yield step, window.summarize(trainer)
            window = _Window()
            trainer.model.train()  # an evaluation may have come between
        else:
            yield step, {}


def _step(trainer: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do one optimizer step; return the loss, the accuracy in the batch and the gradient norm, all ()."""
    embeddings = trainer.model(batch.pixel_values, batch.input_ids, batch.attention_mask)
    loss = trainer.loss(embeddings, batch.caption_ids)
    trainer.accelerator.backward(loss.value)
    max_norm = trainer.max_grad_norm or float("inf")
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), max_norm)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.dual_encoder.clamp_logit_scale()
    if trainer.ema is not None:
        trainer.ema.update_parameters(trainer.dual_encoder)
    return loss.value.detach(), loss.accuracy, torch.as_tensor(norm)


@dataclass
class _Window:
    """Sums since the last logged step."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0
    padding: float = 0.0
    skipped: int = 0
    scalars: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def add(self, batch: Batch, *scalars: torch.Tensor) -> None:
        self.scalars.append(scalars)
        self.images += len(batch.keys)
        self.padding += batch.padding_share
        self.skipped += len(batch.skipped)

    def summarize(self, trainer: Trainer) -> dict[str, float]:
        count = len(self.scalars)
        loss, accuracy, norm = (torch.stack(column).float().mean().item() for column in zip(*self.scalars, strict=True))
        seconds = time.perf_counter() - self.began
        local = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": norm,
            "data_wait_share": self.waited / seconds,
            "padding_share": self.padding / count,
            "images_per_second": self.images / seconds,
            "skipped": float(self.skipped),
        }
        stats = distributed.mean(local, trainer.accelerator.device)
        for total in ("images_per_second", "skipped"):
            stats[total] *= distributed.world_size()
        stats["logit_scale"] = trainer.dual_encoder.logit_scale()
        stats["lr"] = float(trainer.scheduler.get_last_lr()[0])
        return stats
