"""The run directory: configuration, metrics, skipped samples, checkpoints to resume from, the published model."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from koclip import distributed
from koclip.config import ConfigError, TokenizerConfig, dump
from koclip.data.batches import Batch, Position
from koclip.text.tokenizers import forget_call_state, train_bpe
from koclip.text.tokenizers import load as load_tokenizer
from koclip.training.loop import Trainer

_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "koclip")
_MIN_DRAWN = 1_000  # rows drawn before the skipped share is judged


class SkippedError(RuntimeError):
    """Too many samples were unusable."""


@dataclass
class Progress:
    """Where a run is: what a resumed run needs besides weights."""

    step: int = 0
    positions: tuple[Position, ...] = ()


class Run:
    """One training run's directory.

    Args:
        recipe: The recipe's name, for the default directory.
        output_dir: The directory; default: runs/<recipe>-<date and time>.
        resume: Go on from the newest checkpoint in it.

    Raises:
        ConfigError: the directory holds a run and `resume` is off.
    """

    def __init__(self, recipe: str, output_dir: str | None, resume: bool) -> None:
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(distributed.gather_objects(output_dir or f"runs/{name}")[0])
        if not resume and (self.path / "checkpoints").exists():
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; pass --resume auto to go on with it, or another directory"
            )
        distributed.barrier()
        self.resuming = resume and self.latest() is not None
        self.positions: dict[int, Position] = {}
        self._skipped: set[str] = set()
        self.num_skipped = self._drawn = 0
        (self.path / "pictures").mkdir(parents=True, exist_ok=True)

    def start(self, config: Any, accelerator: Accelerator) -> None:
        """Write config.yaml and environment.json, and start the tracker that `accelerator` was made with."""
        self._accelerator = accelerator
        accelerator.project_configuration.set_directories(str(self.path))
        accelerator.init_trackers("tracker")
        if distributed.rank() == 0:
            dump(config, self.path / "config.yaml")
            _write_json(self.path / "environment.json", environment())

    def tokenizer(self, config: TokenizerConfig, captions: Iterator[str]) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer: the one it began with, the one that `config` names, or one trained now.

        It is kept in tokenizer/, so that a resumed run reads the same ids.
        """
        directory = self.path / "tokenizer"
        if distributed.rank() == 0 and not directory.exists():
            if config.path is not None:
                made = load_tokenizer(config.path, config.max_tokens)
            else:
                made = train_bpe(itertools.islice(captions, config.train_captions), config.vocab_size, config.max_tokens)
            made.save_pretrained(directory)
        distributed.barrier()
        return load_tokenizer(str(directory), config.max_tokens)

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and hand it to the tracker."""
        self._accelerator.log(stats, step=step)
        if distributed.rank() == 0:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **stats}) + "\n")

    def watch(self, batches: Iterator[Batch], max_skipped_fraction: float) -> Iterator[Batch]:
        """Pass batches on; list their skipped samples in skipped.jsonl and note the readers' positions.

        Raises:
            SkippedError: more than `max_skipped_fraction` of the rows drawn could not be used.
        """
        for batch in batches:
            if batch.position is not None:
                self.positions[batch.position.reader] = batch.position
            self._drawn += batch.num_drawn
            self.num_skipped += len(batch.skipped)
            new = [skip for skip in batch.skipped if skip.key not in self._skipped]
            if new:
                self._skipped.update(skip.key for skip in new)
                with (self.path / "skipped.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in new)
            if self._drawn >= _MIN_DRAWN and self.num_skipped > max_skipped_fraction * self._drawn:
                listed = "\n".join(f"  {skip.key}: {skip.reason}" for skip in new[:10])
                raise SkippedError(
                    f"{self.num_skipped} of {self._drawn} samples could not be used, more than data.max_skipped_fraction "
                    f"({max_skipped_fraction}); all of them are in {self.path / 'skipped.jsonl'}, the last ones:\n{listed}"
                )
            yield batch

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint. One that was being written has another name."""
        found = sorted((self.path / "checkpoints").glob("step-*/state.json"))
        return found[-1].parent if found else None

    def save(self, trainer: Trainer, step: int, keep: int) -> Path:
        """Write checkpoints/step-<step>/ so that it is there whole or not at all; keep the newest `keep`."""
        final = self.path / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(f"writing-{final.name}")
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.barrier()
        _write_state(partial, trainer, Progress(step, tuple(self.positions.values())))
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync_directory(final.parent)
            for old in sorted(final.parent.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
        distributed.barrier()
        return final

    def load(self, trainer: Trainer) -> Progress:
        """Put the newest checkpoint's state into `trainer`; a fresh run starts at step 0."""
        latest = self.latest()
        if latest is None:
            return Progress()
        progress = _read_state(latest, trainer)
        self.positions = {position.reader: position for position in progress.positions}
        listed = self.path / "skipped.jsonl"
        if listed.exists():
            self._skipped = {json.loads(line)["key"] for line in listed.read_text(encoding="utf-8").splitlines()}
        return progress

    def save_model(self, trainer: Trainer, processor: ProcessorMixin) -> Path:
        """Write model/: what `from_pretrained` of stock transformers loads. fp32, safetensors."""
        weights = cast(dict[str, torch.Tensor], get_model_state_dict(trainer.model, options=_OPTIONS))
        if trainer.ema is not None:
            weights = trainer.averaged.state_dict()
        directory = self.path / "model"
        if distributed.rank() == 0:
            publish(directory, trainer.dual_encoder.model, processor, weights)
        distributed.barrier()
        return directory


def publish(
    directory: Path, model: PreTrainedModel, processor: ProcessorMixin, weights: dict[str, torch.Tensor]
) -> None:
    """Write a stock model directory from a `DualEncoder`'s state dict."""
    if "logit_bias" in weights:
        model.config.logit_bias = weights["logit_bias"].item()
    stock = {
        name.removeprefix("model."): value.float() if value.is_floating_point() else value
        for name, value in weights.items()
        if name != "logit_bias"
    }
    stock["logit_scale"] = stock["logit_scale"].reshape(())  # of one dimension under FSDP2
    model.save_pretrained(directory, state_dict=stock)
    forget_call_state(processor.tokenizer)
    processor.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)  # preprocessor_config.json, which older readers look for


def environment() -> dict[str, Any]:
    """Return what a number depends on: versions, hardware, the commit of the code."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "num_processes": distributed.world_size(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _write_state(directory: Path, trainer: Trainer, progress: Progress) -> None:
    rngs = distributed.gather_objects(_rng_state())
    positions = [position for part in distributed.gather_objects(progress.positions) for position in part]
    model, optimizer = cast(
        tuple[dict[str, torch.Tensor], dict[str, Any]],
        get_state_dict(trainer.model, _plain(trainer.optimizer), options=_OPTIONS),
    )
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
    _write_json(
        directory / "state.json",
        {
            "step": progress.step,
            "positions": positions,
            "param_groups": optimizer["param_groups"],
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "num_processes": distributed.world_size(),
        },
    )
    for name in ("state.safetensors", "state.json"):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())


def _read_state(directory: Path, trainer: Trainer) -> Progress:
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
    set_state_dict(
        trainer.model,
        _plain(trainer.optimizer),
        model_state_dict=cast(dict[str, Any], parts["model"]),
        optim_state_dict={"state": moments, "param_groups": facts["param_groups"]},  # type: ignore[dict-item]
        options=_OPTIONS,
    )
    trainer.scheduler.load_state_dict(facts["scheduler"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(parts["ema"])
    if trainer.accelerator.scaler is not None and facts["scaler"]:
        trainer.accelerator.scaler.load_state_dict(facts["scaler"])
    _set_rng_state(parts["rng"], distributed.rank())
    return Progress(facts["step"], tuple(Position(*position) for position in facts["positions"]))


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
