"""Everything a run needs to go on as if it had never stopped, as safetensors and JSON."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from koclip import distributed
from koclip.data.batches import Position
from koclip.models.dual_encoder import MAX_LOGIT_SCALE
from koclip.training.loop import Trainer

# Whole tensors on the CPU, whatever shards the model.
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_DEEPSPEED = "deepspeed"  # folder of DeepSpeed's shards


@dataclass
class Progress:
    """Where a run is: what a resumed run needs besides weights."""

    step: int = 0
    positions: tuple[Position, ...] = ()  # of this process's readers of streamed sources
    all_positions: tuple[Position, ...] = ()  # of every process's


def write(directory: Path, trainer: Trainer, progress: Progress) -> None:
    """Write the whole state of a run into `directory` and sync it to disk; call it on every process.

    Weights, moments and random-number states go into state.safetensors, the rest into state.json: no pickle.
    """
    rngs = distributed.gather_objects(_rng_state())
    positions = distributed.gather_objects(progress.positions)
    model, optimizer = _weights_and_moments(directory, trainer)
    if distributed.rank() != 0:
        return
    state = {f"model.{name}": value for name, value in model.items()}
    for name, moments in optimizer["state"].items():
        state |= {f"optimizer.{name}/{moment}": value for moment, value in moments.items()}
    for rank, rng in enumerate(rngs):
        state |= {f"rng.{rank}.{name}": value for name, value in rng.items()}
    if trainer.ema is not None:
        state |= {f"ema.{name}": value for name, value in trainer.ema.state_dict().items()}
    scaler = trainer.accelerator.scaler
    save_file({name: value.contiguous() for name, value in state.items()}, directory / "state.safetensors")
    facts = {
        "step": progress.step,
        "positions": positions,
        "param_groups": optimizer["param_groups"],
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "num_processes": distributed.world_size(),
    }
    (directory / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in ("state.safetensors", "state.json"):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())


def read(directory: Path, trainer: Trainer) -> Progress:
    """Put the state in `directory` into `trainer` and this process's generators; call it on every process."""
    facts = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}, "ema": {}}
    with safe_open(directory / "state.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in parts["optimizer"].items():
        parameter, moment = name.rsplit("/", 1)
        moments.setdefault(parameter, {})[moment] = value
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model.load_checkpoint(directory, tag=_DEEPSPEED)  # type: ignore[operator]
    else:
        set_state_dict(
            trainer.model,
            _plain(trainer.optimizer),
            model_state_dict=cast(dict[str, Any], parts["model"]),
            optim_state_dict={"state": moments, "param_groups": facts["param_groups"]},  # type: ignore[dict-item]
            options=FULL,
        )
    trainer.scheduler.load_state_dict(facts["scheduler"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(parts["ema"])
    if trainer.accelerator.scaler is not None and facts["scaler"]:
        trainer.accelerator.scaler.load_state_dict(facts["scaler"])
    _set_rng_state(parts["rng"], distributed.rank())
    by_process = [tuple(Position(*one) for one in part) for part in facts["positions"]]
    mine = by_process[distributed.rank()] if distributed.rank() < len(by_process) else ()
    return Progress(facts["step"], mine, tuple(itertools.chain(*by_process)))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a `DualEncoder`'s weights in full precision and whole, on the CPU; call it on every process."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(one) for name, one in trainer.dual_encoder.named_parameters()}
        masters["model.logit_scale"].clamp_(max=MAX_LOGIT_SCALE)  # only its working copy is clamped after a step
        return {**trainer.dual_encoder.state_dict(), **masters}
    return cast(dict[str, torch.Tensor], get_model_state_dict(trainer.model, options=FULL))


def _weights_and_moments(directory: Path, trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return both whole. DeepSpeed's engine writes its shards, pickles of its own, beside them instead."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model.save_checkpoint(directory, tag=_DEEPSPEED, save_latest=False)  # type: ignore[operator]
        return {}, {"state": {}, "param_groups": []}
    return cast(
        tuple[dict[str, torch.Tensor], dict[str, Any]],
        get_state_dict(trainer.model, _plain(trainer.optimizer), options=FULL),
    )


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(states: dict[str, torch.Tensor], rank: int) -> None:
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if torch.cuda.is_available() and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
