"""Metrics for the `evaluate` library. Here: their inputs as tensors, and their results as plain numbers."""

from collections.abc import Mapping, Sequence

import torch

from koclip.metrics import Metric


def matrix(rows: Sequence[Sequence[float]], columns: str) -> torch.Tensor:
    """Return rows of numbers as (Q, G) float64. `columns` says what a row has one number of.

    Raises:
        ValueError: the rows differ in length, or a number is missing.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            f"predictions: got rows of {min(lengths)} to {max(lengths)} numbers; expected one per {columns} in each"
        )
    for place, row in enumerate(rows):
        if None in row:
            raise ValueError(f"predictions: row {place} has a missing number; expected one per {columns}")
    return torch.tensor(rows, dtype=torch.float64)


def positives(owned: Sequence[Sequence[int]], count: int, columns: str) -> torch.Tensor:
    """Return which of `count` columns each row owns, (Q, count) bool.

    Raises:
        ValueError: a row owns none, or one that is not there.
    """
    marked = torch.zeros(len(owned), count, dtype=torch.bool)
    for place, own in enumerate(owned):
        if not own or not all(0 <= column < count for column in own):
            expected = f"expected the number of at least one {columns}, 0 to {count - 1}"
            raise ValueError(f"references: row {place} is {list(own)}; {expected}")
        marked[place, list(own)] = True
    return marked


def flat(metrics: Mapping[str, Metric]) -> dict[str, float | int | list[float]]:
    """Return metrics by name, their 95 % intervals as `<name>_ci95`, and the number of rows, `n`."""
    values: dict[str, float | int | list[float]] = {}
    for name, metric in metrics.items():
        values |= {name: metric.value, f"{name}_ci95": list(metric.ci95), "n": metric.n}
    return values
