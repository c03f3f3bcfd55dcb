"""The directory of an evaluation: what was asked, of what, and what was left out."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from koclip import distributed, storage
from koclip.config import ConfigError, EvaluateConfig, dump
from koclip.evaluation.sets import EvalSet
from koclip.storage import environment


def processes(config: EvaluateConfig) -> Accelerator:
    """Return the accelerator that makes the processes of a launch one group.

    Raises:
        ConfigError: there are several that are none. On a CPU torchrun needs ACCELERATE_USE_CPU=true: without it each
            of them would silently evaluate everything.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched and do not find each other; on CPUs launch with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched}`"
        )
    return accelerator


def start(config: EvaluateConfig, sets: Sequence[EvalSet]) -> Path:
    """Return the run directory, the same on every process; config.yaml and skipped.jsonl are in it."""
    name = config.output_dir or f"runs/evaluate-{datetime.now():%Y%m%d-%H%M%S}"
    run = Path(distributed.gather_objects(name)[0])
    if distributed.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        dump(config, run / "config.yaml")
        skipped = [skip._asdict() for one in sets for skip in one.all_skipped()]
        (run / "skipped.jsonl").unlink(missing_ok=True)
        if skipped:
            storage.append_lines(run / "skipped.jsonl", skipped)
    distributed.barrier()
    return run


def surroundings() -> dict[str, Any]:
    """Return what the numbers depend on besides model and data; the number of processes is not among it."""
    return {name: value for name, value in environment().items() if name != "num_processes"}


def folders_of(run: Path, models: Sequence[str]) -> dict[str, Path]:
    """Return where each model's results go: the run directory, or of several models a directory each in it."""
    labels = labels_of(models)
    return {model: run / labels[model] if len(models) > 1 else run for model in models}


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model: of runs/a/model it is a; of what would have the same, the whole name."""
    short = {one: (Path(one).parent if Path(one).name == "model" else Path(one)).name for one in models}
    names = list(short.values())
    return {one: name if names.count(name) == 1 else one.replace("/", "-") for one, name in short.items()}
