"""Run as a program: pushes directories as lines of standard input ask, and answers each with one line of JSON."""

import json
import sys
import time
from pathlib import Path
from typing import SupportsIndex

sleep = time.sleep


def sleep_less(seconds: float | SupportsIndex) -> None:
    """Shorten the waits of the client and of koclip."""
    assert isinstance(seconds, int | float)
    sleep(seconds / 100)


time.sleep = sleep_less

from koclip.config import ConfigError, RunError  # noqa: E402
from koclip.publishing.checks import publishable  # noqa: E402
from koclip.publishing.push import Repository, check_base, check_rights, push  # noqa: E402


def answer(job: dict) -> dict:
    directory = Path(job.pop("directory"))
    try:
        check_rights(job["repo_id"])
        check_base(directory)
        repo = Repository(job["repo_id"], private=job.get("private", False))
        pushed = push(directory, publishable(directory), repo, "Publish the model", job.get("tag"))
    except (ConfigError, RunError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    changes = pushed.changes
    return {"commit": pushed.commit, "added": changes.added, "deleted": changes.deleted, "url": pushed.url}


for line in sys.stdin:
    sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
    sys.stdout.flush()
