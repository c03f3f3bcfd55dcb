"""What the speed benchmarks share: options, a worker process, the hardware, and the speed relative to a peer."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

import torch

from koclip import storage


def add_timing_options(cli: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of a benchmark that measures its cases in turn, `rounds` times by default."""
    cli.add_argument("--rounds", type=int, default=rounds, help="measured rounds (default: %(default)s)")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    cli.add_argument("--cpu_time", action="store_true", help="count CPU seconds (for one thread, on a busy machine)")


def run_worker(file: str, words: Sequence[str], name: str) -> dict[str, float]:
    """Run a benchmark as its own worker process, and return the numbers in its last line, which is JSON.

    `name` names the measured case if the worker fails.
    """
    done = subprocess.run([sys.executable, file, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def spread(own: Sequence[float], peer: Sequence[float]) -> str:
    """Return the speed of a loop relative to its peer: the median of the rounds (lowest-highest)."""
    ratios = [other / seconds for seconds, other in zip(own, peer, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def hardware() -> str:
    """Return a description of the CPU."""
    bf16 = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    if bf16 == "no AMX" and torch.cpu._is_avx512_bf16_supported():
        bf16 += ", AVX-512 bf16"
    return f"{storage.cpu_name()} ({bf16}), {torch.get_num_threads()} of {os.cpu_count()} cores"
