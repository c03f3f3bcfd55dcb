"""Runs of recipes/align.py that die at a given moment as of SIGKILL; test_align_crash starts them in own processes."""

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from align_runs import align

from koclip import training
from koclip.embeddings import fill, store
from koclip.evaluation.report import write as _slow_to_load  # noqa: F401
from koclip.runs.checkpoints import Snapshot
from koclip.runs.session import Session
from koclip.training import loop


class Moment(NamedTuple):
    """The call, counted from 0 in a process, in which a run dies."""

    what: str
    call: int

    def __str__(self) -> str:
        return f"{self.what}-{self.call}"


class Place(NamedTuple):
    """A process among those of a run."""

    rank: int = 0
    world_size: int = 1
    port: int = 0


CALLS: dict[str, tuple[Any, str]] = {
    "features": (store, "save_file"),  # half of a shard is written
    "step": (loop, "_step"),
    "checkpoint": (Snapshot, "write"),  # all files are there, but for the checksums
    "between": (training, "release"),  # the first stage is over, its checkpoint written
    "publish": (Session, "save_model"),
}


def dying(wrapped: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    calls = itertools.count()

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) != moment.call:
            return wrapped(*args, **options)
        if moment.what == "checkpoint":
            wrapped(*args, **options)
        elif moment.what == "features":
            args[1].write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return call


def run(log: Path, args: list[str], moment: Moment | None, place: Place) -> None:
    """Run the recipe in this process until the moment comes, or to its end."""
    multiprocessing.set_start_method("fork", force=True)  # of data loaders: this process is a server's
    file = log.open("a")
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if place.world_size > 1:
        facts = {"RANK": place.rank, "LOCAL_RANK": place.rank, "MASTER_PORT": place.port}
        facts |= {"WORLD_SIZE": place.world_size, "LOCAL_WORLD_SIZE": place.world_size, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in facts.items()})
    fill.SHARD_ROWS, fill.BATCH_ROWS = 8, 4  # so that there are several shards
    if moment is not None and place.rank == 0:
        room, name = CALLS[moment.what]
        setattr(room, name, dying(getattr(room, name), moment))
    align(*args)
