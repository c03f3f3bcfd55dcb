"""Output of the speed benchmarks: the hardware, and the speed relative to a peer."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch


def spread(own: Sequence[float], peer: Sequence[float]) -> str:
    """Return the speed of a loop relative to its peer: the median of the rounds (lowest-highest)."""
    ratios = [other / seconds for seconds, other in zip(own, peer, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def hardware() -> str:
    """Return a description of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    bf16 = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    if bf16 == "no AMX" and torch.cpu._is_avx512_bf16_supported():
        bf16 += ", AVX-512 bf16"
    return f"{name} ({bf16}), {torch.get_num_threads()} of {os.cpu_count()} cores"
