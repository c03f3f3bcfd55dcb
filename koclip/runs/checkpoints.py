"""Checkpoints in safetensors and JSON. A run that resumes from one gives the same results as an uninterrupted run.

They are written in the background, complete or not at all. A resumed run loads the newest intact checkpoint.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from tqdm.auto import tqdm

from koclip import distributed, storage
from koclip.config import ConfigError, RunError
from koclip.data.batches import Position
from koclip.optim import set_step
from koclip.training import TrainState
from koclip.training.grad_cache import random_states, restore_random
from koclip.training.loop import Counts

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded tensors, on the CPU
_DEEPSPEED = "deepspeed"  # folder of DeepSpeed's shards


class Checkpoints:
    """The checkpoints `step-<step>/` of a run, in one folder.

    The prefixes `writing-`, `deleting-` and `damaged-` mark directories that are no checkpoints. Only one process may
    write; all may read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def begin(self, step: int) -> Path:
        """Return an empty directory for a checkpoint, when the previous checkpoint is on disk."""
        self.wait()
        partial = self.folder / f"writing-step-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, write: Callable[[Path], None], keep: int) -> None:
        """In the background: call `write(partial)`, rename it to a checkpoint, delete all but the newest `keep`."""
        self._pending = self._thread.submit(self._finish, partial, write, keep)

    def wait(self) -> None:
        """Wait until the latest checkpoint is on disk.

        Raises:
            RunError: it could not be written. Earlier checkpoints are not changed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def stop_if_failed(self) -> None:
        """Raise the error of `wait` if writing has failed already. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def newest_intact(self) -> Path | None:
        """Return the newest intact checkpoint; None if the run has no checkpoint.

        Damaged checkpoints that are newer are reported and renamed. Half-written directories are deleted.

        Raises:
            RunError: all checkpoints are damaged.
        """
        for partial in [*self.folder.glob("writing-*"), *self.folder.glob("deleting-*")]:
            shutil.rmtree(partial)
        for checkpoint in sorted(self.folder.glob("step-*"), reverse=True):
            reason = storage.damage(checkpoint)
            if reason is None:
                return checkpoint
            aside = self._move(checkpoint, "damaged")
            tqdm.write(f"Checkpoint {checkpoint.name} is damaged and not used: {reason}. Renamed to {aside.name}.")
        damaged = sorted(path.name for path in self.folder.glob("damaged-*"))
        if damaged:
            raise RunError(
                f"resume: all checkpoints in {self.folder} are damaged ({', '.join(damaged)}); start a new run in "
                "another output_dir, or repair a checkpoint and rename it to step-<step>"
            )
        return None

    def _finish(self, partial: Path, write: Callable[[Path], None], keep: int) -> None:
        final = self.folder / partial.name.removeprefix("writing-")
        try:
            write(partial)
            storage.seal(partial)
            storage.put(partial, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{final} could not be written: {error}. Earlier checkpoints are intact; free disk space or move the "
                "run to another disk, then continue with --resume auto"
            ) from error
        for old in sorted(self.folder.glob("step-*"))[:-keep]:
            shutil.rmtree(self._move(old, "deleting"))

    def _move(self, checkpoint: Path, prefix: str) -> Path:
        """Rename a checkpoint, so that it is not used even if the process is killed now."""
        target = checkpoint.with_name(f"{prefix}-{checkpoint.name}")
        shutil.rmtree(target, ignore_errors=True)
        return checkpoint.rename(target)


@dataclass
class Progress:
    """How far a run is: the number of steps done, and the positions of the readers of streamed sources."""

    step: int = 0
    positions: tuple[Position, ...] = ()  # of this process's readers
    all_positions: tuple[Position, ...] = ()  # of the readers of all processes


@dataclass
class Snapshot:
    """A copy of a run's state in host memory, which training does not change."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write state.safetensors and state.json."""
        save_file(self.tensors, directory / "state.safetensors")
        text = json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n"
        (directory / "state.json").write_text(text, encoding="utf-8")


def collect(directory: Path, state: TrainState, progress: Progress, launch: dict[str, Any]) -> Snapshot:
    """Copy the whole state of a run. Call it on every process.

    `launch` is the run's configuration and the facts of its data, which a resumed run compares with its own. DeepSpeed
    writes its shards (pickles) into `directory`, the unfinished checkpoint.
    """
    by_rank = enumerate(distributed.gather_objects(random_states()))
    tensors = {f"rng.{rank}.{name}": value for rank, states in by_rank for name, value in states.items()}
    facts: dict[str, Any] = {
        "step": progress.step,
        "positions": distributed.gather_objects([position._asdict() for position in progress.positions]),
        "health": asdict(state.health.counts),
        "scaler": state.accelerator.scaler.state_dict() if state.accelerator.scaler is not None else None,
        "num_processes": distributed.world_size(),
        **launch,
    }
    model: Any
    optimizer: Any
    if _uses_deepspeed(state):
        state.model.save_checkpoint(directory, tag=_DEEPSPEED, save_latest=False)  # type: ignore[operator]
        model, optimizer = {}, {"state": {}, "param_groups": []}
    else:
        model, optimizer = get_state_dict(state.model, _plain(state.optimizer), options=FULL)
    if distributed.rank() != 0:
        return Snapshot({}, {})
    facts["param_groups"] = optimizer["param_groups"]
    tensors |= {f"model.{name}": value for name, value in model.items()}
    for name, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{name}/{moment}": value for moment, value in moments.items()}
    if state.ema is not None:
        tensors |= {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    shared = state.accelerator.device.type == "cpu"  # the next step changes tensors on the CPU
    return Snapshot({name: value.to("cpu", copy=shared).contiguous() for name, value in tensors.items()}, facts)


def _uses_deepspeed(state: TrainState) -> bool:
    return bool(state.accelerator.distributed_type == DistributedType.DEEPSPEED)


def read_facts(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    facts: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return facts


def restore(directory: Path, state: TrainState, start: int = 0) -> Progress:
    """Load the checkpoint in `directory` into `state` and the random generators. Call it on every process.

    Learning rate and weight decay are not loaded: they follow from the configuration and the step. A checkpoint of step
    `start`, the stage's first step, is the end of the previous stage: only its weights and generators are loaded. If
    the checkpoint has no moving average, the average starts from its weights.

    Raises:
        ConfigError: the checkpoint has another model's weights, or an older koclip wrote it.
    """
    facts = read_facts(directory)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}, "ema": {}}
    with safe_open(directory / "state.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    begins = 0 < start == facts["step"]
    if _uses_deepspeed(state):
        state.model.load_checkpoint(directory, tag=_DEEPSPEED, load_module_only=begins)  # type: ignore[operator]
    elif begins:
        _check_fit(parts["model"], None, state)
        set_model_state_dict(state.model, cast(dict[str, Any], parts["model"]), options=FULL)
    else:
        _check_fit(parts["model"], {name for group in facts["param_groups"] for name in group["params"]}, state)
        _set_weights_and_moments(state, parts["model"], parts["optimizer"], facts["param_groups"])
    if not begins:
        set_step(state.scheduler, facts["step"])
        state.health.counts = Counts(**facts["health"])
    if state.ema is not None:
        if begins or not parts["ema"]:
            state.ema.module.load_state_dict(state.dual_encoder.state_dict())
        else:
            state.ema.load_state_dict(parts["ema"])
    if state.accelerator.scaler is not None and facts["scaler"]:
        state.accelerator.scaler.load_state_dict(facts["scaler"])
    rank = f"{distributed.rank()}."
    restore_random({name.removeprefix(rank): value for name, value in parts["rng"].items() if name.startswith(rank)})
    if begins:  # readers of streamed sources start from the beginning
        return Progress(start)
    by_process = [tuple(map(_position, part)) for part in facts["positions"]]
    positions = by_process[distributed.rank()] if distributed.rank() < len(by_process) else ()
    return Progress(facts["step"], positions, tuple(itertools.chain(*by_process)))


def _position(saved: Any) -> Position:
    if not isinstance(saved, dict):
        raise ConfigError(
            "resume: an older koclip wrote the checkpoint; its position in streamed data counts batches, expected "
            "samples: finish the run with that version, or start a new run"
        )
    return Position(**saved)


def _check_fit(saved: dict[str, torch.Tensor], trained: set[str] | None, state: TrainState) -> None:
    """Check that a checkpoint has the weights of `state`, and the same trained weights (None: not compared)."""
    current = state.dual_encoder.state_dict()
    sizes = [{name: value.numel() for name, value in weights.items()} for weights in (saved, current)]
    differing = {name for name in saved | current if sizes[0].get(name) != sizes[1].get(name)}
    if trained is not None:
        differing |= trained ^ {name for name, weight in state.dual_encoder.named_parameters() if weight.requires_grad}
    if differing:
        raise ConfigError(
            f"resume: the checkpoint does not fit the model of this configuration: {len(differing)} weights are "
            f"missing, have another size, or are trained on one side only (the first: {min(differing)}). resume_with "
            "cannot allow this: restore the old values of the model, loss and align sections, or start a new run"
        )


def _set_weights_and_moments(
    state: TrainState, model: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in moments.items():
        parameter, moment = name.rsplit("/", 1)
        by_parameter.setdefault(parameter, {})[moment] = value
    optimizer = _plain(state.optimizer)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_state_dict(
        state.model,
        optimizer,
        model_state_dict=cast(dict[str, Any], model),
        optim_state_dict={"state": by_parameter, "param_groups": groups},  # type: ignore[dict-item]
        options=FULL,
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    """Return a `DualEncoder`'s weights, unsharded, in full precision, on the CPU. Call it on every process."""
    if _uses_deepspeed(state):
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(weight) for name, weight in state.dual_encoder.named_parameters()}
        masters["model.logit_scale"].clamp_(max=state.dual_encoder.max_logit_scale)  # as after each step
        return {**state.dual_encoder.state_dict(), **masters}
    return cast(dict[str, torch.Tensor], get_model_state_dict(state.model, options=FULL))


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
