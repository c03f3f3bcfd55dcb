"""Processes that start fast: a server has loaded all libraries, and forks."""

import multiprocessing
import os
from pathlib import Path

import pytest


def fork_server(module: str) -> multiprocessing.context.ForkServerContext:
    """Return a way to start processes that have loaded a module of tests and done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload([module])
        context.Process(target=os.getpid).start()
    return context
