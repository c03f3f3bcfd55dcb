"""Run recipes in their own processes, measure what they cost, and read the numbers in their results.json."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from koclip.metrics import Metric

RECIPES = Path(__file__).parents[1]
COST = "cost.json"


class Cost(NamedTuple):
    """The cost of a process and its worker processes."""

    minutes: float  # wall clock
    cpu_minutes: float
    gib: float  # peak resident memory, of the largest process


def start(recipe: str, *words: str) -> Cost:
    """Run a recipe; stop if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(RECIPES / recipe), *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"recipes/{recipe} {' '.join(words)} stopped with status {process.returncode}")
    cpu_minutes = (usage.ru_utime + usage.ru_stime) / 60
    return Cost((time.perf_counter() - began) / 60, cpu_minutes, usage.ru_maxrss / 2**20)


def start_once(run: Path, recipe: str, *words: str) -> Cost:
    """Run a recipe into the directory `run`, and write its cost there; if it has run before, return that cost.

    An interrupted run is deleted and runs again, because its cost is not known.
    """
    if not (run / COST).exists():
        shutil.rmtree(run, ignore_errors=True)
        cost = start(recipe, "--output_dir", str(run), *words)
        (run / COST).write_text(json.dumps(cost._asdict()), encoding="utf-8")
    return cost_of(run)


def cost_of(run: Path) -> Cost:
    """Return the cost of a run that `start_once` has started."""
    return Cost(**json.loads((run / COST).read_text(encoding="utf-8")))


def line(value: Any) -> str:
    """Return a value as an option of a recipe."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)).strip()


def shown(metric: Metric, sign: str = "") -> str:
    """Return a share in percent, with its interval; `sign` is "+" for differences."""
    low, high = metric.ci95
    return f"{100 * metric.value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def results_of(run: Path) -> dict[str, Any]:
    """Return the content of a run's results.json."""
    results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return results


def number(run: Path, name: str) -> Metric:
    """Return a number of a results.json, whose name ends with `name`; of the first data set that has it."""
    matching = [values for key, values in results_of(run)["metrics"].items() if key.endswith(f"/{name}")]
    if not matching:
        raise SystemExit(f"{run / 'results.json'}: got no number {name}; is the source at chance?")
    return Metric.from_dict(matching[0])
