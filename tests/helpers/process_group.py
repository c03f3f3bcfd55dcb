"""The process group of a test's program."""

import contextlib
import os
from collections.abc import Iterator

import torch

from koclip import distributed


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that were started together, and wait for all at the end. A process alone has no group."""
    alone = "RANK" not in os.environ
    if not alone:
        torch.distributed.init_process_group("gloo")
    yield
    distributed.barrier()
    if not alone:
        torch.distributed.destroy_process_group()
