"""The speed of a machine: fitted to runs that were measured on it, and used to predict other runs.

The seconds of a step are a sum: each FLOP, each byte that an operation writes and each call of an operation has a
price. The prices are fitted by non-negative least squares on relative errors (scipy). This is the roofline model
(Williams et al. 2009) with a sum in place of the maximum, because products and element-wise operations run one after
the other. A process has more memory than the plan counts, so the peak has a base and a factor, fitted likewise.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from koclip import storage
from koclip.config import ConfigError, check

_FORMAT = 1


@dataclass(frozen=True)
class Work:
    """What a step of a run does, counted by the plan."""

    precision: str
    flops: float
    written: float  # bytes
    calls: float  # operations
    peak: float  # bytes of memory


@dataclass(frozen=True)
class Measured:
    """A stage of a run that was measured."""

    run: str
    work: Work
    seconds: float  # of a step
    peak: float  # bytes of memory above the memory before the model


@dataclass(frozen=True)
class Speed:
    """The prices of a machine, in seconds: `fp32`, `bf16` and `fp16` (a FLOP), `written` (a byte), `calls` (a call).

    Args:
        prices: Prices by name. What was not fitted is absent.
        memory: Base in bytes, and factor, of the peak.
    """

    prices: dict[str, float]
    memory: tuple[float, float]

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step.

        Raises:
            ConfigError: no run in this precision was measured.
        """
        if work.precision not in self.prices:
            raise ConfigError(
                f"machine: got no run in {work.precision}, expected one: measure it with --steps 20 and the same file"
            )
        written, calls = (self.prices.get(name, 0.0) for name in ("written", "calls"))
        return self.prices[work.precision] * work.flops + written * work.written + calls * work.calls

    def peak(self, work: Work) -> float:
        """Return the bytes of memory at the peak, above the memory before the model."""
        base, factor = self.memory
        return base + factor * work.peak


def fit(measured: Sequence[Measured]) -> Speed:
    """Return the prices of a machine.

    As many prices are fitted as there are measured stages, in this order: FLOPs in each precision, bytes, calls.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("measured: got nothing, expected at least one stage")
    works = [stage.work for stage in measured]
    precisions = list(dict.fromkeys(work.precision for work in works))
    columns = {name: [work.flops * (work.precision == name) for work in works] for name in precisions}
    for name in ("written", "calls")[: max(0, len(works) - len(precisions))]:
        columns[name] = [getattr(work, name) for work in works]
    prices = _relative_fit(list(columns.values()), [stage.seconds for stage in measured])
    peaks = [work.peak for work in works]
    memory = [[1.0] * len(works), peaks] if len(works) > 1 else [peaks]
    *base, factor = _relative_fit(memory, [stage.peak for stage in measured])
    return Speed(dict(zip(columns, prices, strict=True)), (base[0] if base else 0.0, factor))


def _relative_fit(columns: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Return the non-negative weights of the columns whose sum has the least squares of relative errors."""
    matrix = np.array(columns, dtype=np.float64).T / np.array(targets)[:, None]
    sizes = np.abs(matrix).max(axis=0)  # FLOPs are some 1e9 and calls some 1e3: the solver wants similar sizes
    sizes[sizes == 0] = 1.0
    weights, _ = nnls(matrix / sizes, np.ones(len(targets)))
    return [float(weight) for weight in weights / sizes]


def read(path: Path) -> list[Measured]:
    """Return the measured stages of a machine file.

    Raises:
        ConfigError: the file is absent or no machine file.
    """
    fix = "expected a file that `koclip plan <run> --steps 20 --machine FILE` has written"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format: got {content['format']}, expected {_FORMAT}")
        return [Measured(**stage | {"work": Work(**stage["work"])}) for stage in content["measured"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"machine: got {path}, {fix}") from error


def add(path: Path, stages: Sequence[Measured]) -> None:
    """Add measured stages to a machine file, or start it.

    Raises:
        ConfigError: the file is of another machine, or no machine file.
    """
    earlier = read(path) if path.exists() else []
    if earlier:
        known = json.loads(path.read_text(encoding="utf-8"))["machine"]
        check(known == machine(), "machine", machine(), f"expected {known}, the machine of {path}; name another file")
    measured = [dataclasses.asdict(stage) for stage in [*earlier, *stages]]
    content = {"format": _FORMAT, "machine": machine(), "measured": measured}
    storage.replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """Return what a speed depends on: the device, the threads and the version of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else storage.cpu_name()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
