"""Everything a run needs to go on as if it had never stopped, as safetensors and JSON."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from koclip import distributed
from koclip.config import ConfigError
from koclip.data.batches import Position
from koclip.models.dual_encoder import MAX_LOGIT_SCALE
from koclip.optim import set_step
from koclip.training import Trainer, rng

Item = TypeVar("Item")

# Whole tensors on the CPU, whatever shards the model.
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_DEEPSPEED = "deepspeed"  # folder of DeepSpeed's shards


@dataclass
class Progress:
    """Where a run is: what a resumed run needs besides weights."""

    step: int = 0
    positions: tuple[Position, ...] = ()  # of this process's readers of streamed sources
    all_positions: tuple[Position, ...] = ()  # of every process's


@dataclass
class Snapshot:
    """A run's state in host memory, which training no longer touches."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write state.safetensors and state.json: no pickle."""
        save_file(self.tensors, directory / "state.safetensors")
        text = json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n"
        (directory / "state.json").write_text(text, encoding="utf-8")


def collect(directory: Path, trainer: Trainer, progress: Progress, launch: dict[str, Any]) -> Snapshot:
    """Copy the whole state of a run; call it on every process.

    `directory` is where the checkpoint is being made: DeepSpeed's engine writes its shards there, pickles of its own.
    `launch` is what a run that goes on is compared with: its configuration and its data.
    """
    tensors = {f"rng.{rank}.{name}": one for rank, states in _all(rng.states()) for name, one in states.items()}
    facts: dict[str, Any] = {
        "step": progress.step,
        "positions": distributed.gather_objects([one._asdict() for one in progress.positions]),
        "health": trainer.health.state_dict(),
        "scaler": trainer.accelerator.scaler.state_dict() if trainer.accelerator.scaler is not None else None,
        "num_processes": distributed.world_size(),
        **launch,
    }
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model.save_checkpoint(directory, tag=_DEEPSPEED, save_latest=False)  # type: ignore[operator]
        found: Any = {}, {"state": {}, "param_groups": []}
    else:
        found = get_state_dict(trainer.model, _plain(trainer.optimizer), options=FULL)
    if distributed.rank() != 0:
        return Snapshot({}, {})
    model, optimizer = found
    facts["param_groups"] = optimizer["param_groups"]
    tensors |= {f"model.{name}": one for name, one in model.items()}
    for name, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{name}/{moment}": one for moment, one in moments.items()}
    if trainer.ema is not None:
        tensors |= {f"ema.{name}": one for name, one in trainer.ema.state_dict().items()}
    shared = trainer.accelerator.device.type == "cpu"  # then these still are what the next step changes
    return Snapshot({name: one.to("cpu", copy=shared).contiguous() for name, one in tensors.items()}, facts)


def read_facts(directory: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that is not tensors."""
    facts: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return facts


def read(directory: Path, trainer: Trainer, start: int = 0) -> Progress:
    """Put the state in `directory` into `trainer` and this process's generators; call it on every process.

    Learning rate, decay and the like are the trainer's own: they follow from the configuration and the step. A
    checkpoint of step `start`, where the trainer's stage begins, is the end of the stage before: only its weights and
    generators go on. A moving average that the checkpoint does not have begins with its weights.

    Raises:
        ConfigError: the checkpoint is of another model, or an older koclip wrote it.
    """
    facts = read_facts(directory)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}, "ema": {}}
    with safe_open(directory / "state.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    begins = 0 < start == facts["step"]
    trained = None if begins else {name for group in facts["param_groups"] for name in group["params"]}
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        _check_fit(parts["model"], trained, trainer)
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model.load_checkpoint(directory, tag=_DEEPSPEED, load_module_only=begins)  # type: ignore[operator]
    elif begins:
        set_model_state_dict(trainer.model, cast(dict[str, Any], parts["model"]), options=FULL)
    else:
        _set_weights_and_moments(trainer, parts["model"], parts["optimizer"], facts["param_groups"])
    if not begins:
        set_step(trainer.scheduler, facts["step"])
        trainer.health.load_state_dict(facts["health"])
    if trainer.ema is not None:
        if begins or not parts["ema"]:  # the average begins with these weights
            trainer.ema.module.load_state_dict(trainer.dual_encoder.state_dict())
        else:
            trainer.ema.load_state_dict(parts["ema"])
    if trainer.accelerator.scaler is not None and facts["scaler"]:
        trainer.accelerator.scaler.load_state_dict(facts["scaler"])
    mine = f"{distributed.rank()}."
    rng.restore({name.removeprefix(mine): one for name, one in parts["rng"].items() if name.startswith(mine)})
    if begins:  # its readers of streamed sources begin anew
        return Progress(start)
    by_process = [tuple(map(_position, part)) for part in facts["positions"]]
    positions = by_process[distributed.rank()] if distributed.rank() < len(by_process) else ()
    return Progress(facts["step"], positions, tuple(itertools.chain(*by_process)))


def _position(saved: Any) -> Position:
    if not isinstance(saved, dict):
        raise ConfigError(
            "resume: an older koclip wrote the checkpoint: its place in streamed data counts batches, not samples; "
            "finish the run with that version, or begin a new one"
        )
    return Position(**saved)


def _check_fit(saved: dict[str, torch.Tensor], trained: set[str] | None, trainer: Trainer) -> None:
    """Make sure that a checkpoint's weights, and those it trains unless that is None, are the trainer's."""
    ours = trainer.dual_encoder.state_dict()
    sizes = [{name: value.numel() for name, value in weights.items()} for weights in (saved, ours)]
    differing = {name for name in saved | ours if sizes[0].get(name) != sizes[1].get(name)}
    if trained is not None:
        now = {name for name, one in trainer.dual_encoder.named_parameters() if one.requires_grad}
        differing |= trained ^ now
    if differing:
        raise ConfigError(
            f"resume: the checkpoint does not fit this configuration's model: {len(differing)} weights are missing on "
            f"one side, of another size, or trained in one only ({min(differing)}). Such a change cannot go on from a "
            "checkpoint, named in resume_with or not: set the keys of model, loss or method back, or begin a new run"
        )


def _set_weights_and_moments(
    trainer: Trainer, model: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in moments.items():
        parameter, moment = name.rsplit("/", 1)
        by_parameter.setdefault(parameter, {})[moment] = value
    optimizer = _plain(trainer.optimizer)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_state_dict(
        trainer.model,
        optimizer,
        model_state_dict=cast(dict[str, Any], model),
        optim_state_dict={"state": by_parameter, "param_groups": groups},  # type: ignore[dict-item]
        options=FULL,
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a `DualEncoder`'s weights in full precision and whole, on the CPU; call it on every process."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(one) for name, one in trainer.dual_encoder.named_parameters()}
        masters["model.logit_scale"].clamp_(max=MAX_LOGIT_SCALE)  # only its working copy is clamped after a step
        return {**trainer.dual_encoder.state_dict(), **masters}
    return cast(dict[str, torch.Tensor], get_model_state_dict(trainer.model, options=FULL))


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _all(item: Item) -> Iterator[tuple[int, Item]]:
    """Yield (rank, item) of every process."""
    yield from enumerate(distributed.gather_objects(item))
