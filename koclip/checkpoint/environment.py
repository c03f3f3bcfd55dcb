"""What a number depends on besides the configuration."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from koclip import distributed

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "koclip")


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
