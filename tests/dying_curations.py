"""A program: `koclip curate` dies at a moment as of SIGKILL. test_curation_equal starts it.

python dying_curations.py MOMENT --config FILE
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from koclip import storage
from koclip.config import CurateConfig, parse
from koclip.curation import pipeline, report

# The function whose call kills the process, the number of that call, and whether the call is done before.
MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "check": (pipeline, "batch_of", 1, False),  # a table is open
    "compare": (pipeline, "_append", 7, True),  # tables of the first steps are complete
    "write": (pipeline, "_stored", 30, False),  # a shard has some of its rows
    "report": (report, "_lines", 1, False),  # the shards have moved, dropped.jsonl has some of its lines
    "before the rename": (storage, "put", 0, False),
    "after the rename": (storage, "put", 0, True),
}


def run(config: CurateConfig, moment: str) -> None:
    """Curate until the moment comes."""
    room, name, last, is_done = MOMENTS[moment]
    wrapped, calls = getattr(room, name), itertools.count()

    def dying(*args: Any, **options: Any) -> Any:
        counts = name != "put" or args[1] == Path(config.output_dir)
        if not counts or next(calls) != last:
            return wrapped(*args, **options)
        if is_done:
            wrapped(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(room, name, dying)
    pipeline.curate(config)


if __name__ == "__main__":
    run(parse(CurateConfig, sys.argv[2:]), sys.argv[1])
