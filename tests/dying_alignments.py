"""A program: recipes/align.py dies at a moment as of SIGKILL. test_align_crash starts it.

    python dying_alignments.py MOMENT OPTIONS

A moment is a place and a call of it, counted from 0 in a process. Of several processes the first dies.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from align_runs import align

from koclip import training
from koclip.embeddings import fill, store
from koclip.runs.checkpoints import Snapshot
from koclip.runs.session import Session
from koclip.training import loop

CALLS: dict[str, tuple[Any, str]] = {
    "features": (store, "save_file"),  # half of a shard is written
    "step": (loop, "_step"),
    "checkpoint": (Snapshot, "write"),  # all files are there, but for the checksums
    "between": (training, "release"),  # the first stage is over, its checkpoint written
    "publish": (Session, "save_model"),
}


def dying(wrapped: Callable[..., Any], place: str, last: int) -> Callable[..., Any]:
    calls = itertools.count()

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) != last:
            return wrapped(*args, **options)
        if place == "checkpoint":
            wrapped(*args, **options)
        elif place == "features":
            args[1].write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return call


def run(moment: str, args: list[str]) -> None:
    """Run the recipe until the moment comes, such as `step-5`, or with `end` to its end."""
    fill.SHARD_ROWS, fill.BATCH_ROWS = 8, 4  # so that there are several shards
    if moment != "end" and os.environ.get("RANK", "0") == "0":
        place, last = moment.split("-")
        room, name = CALLS[place]
        setattr(room, name, dying(getattr(room, name), place, int(last)))
    align(*args)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
