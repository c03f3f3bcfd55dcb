"""Metrics for the `evaluate` library. This file converts their inputs to tensors and their results to numbers."""

from collections.abc import Mapping, Sequence

import torch

from koclip.metrics import Metric


def matrix(rows: Sequence[Sequence[float]], columns: str) -> torch.Tensor:
    """Return rows of numbers as (Q, G) float64. A row has one number for each entry; `columns` is the entries' name.

    Raises:
        ValueError: the rows differ in length, or a number is missing.
    """
    lengths, expected = {len(row) for row in rows}, f"expected a number for each {columns} in each row"
    if len(lengths) > 1:
        raise ValueError(f"predictions: got rows of {min(lengths)} to {max(lengths)} numbers; {expected}")
    for place, row in enumerate(rows):
        if None in row:
            raise ValueError(f"predictions: got a missing number in row {place}; {expected}")
    return torch.tensor(rows, dtype=torch.float64)


def positives(owned: Sequence[Sequence[int]], count: int, columns: str) -> torch.Tensor:
    """Return a mask (Q, count) of the right columns of each row.

    Raises:
        ValueError: a row has no right column, or a column that does not exist.
    """
    marked = torch.zeros(len(owned), count, dtype=torch.bool)
    for place, own in enumerate(owned):
        if not own or not all(0 <= column < count for column in own):
            expected = f"expected the index of at least one {columns}, 0 to {count - 1}"
            raise ValueError(f"references: got {list(own)} in row {place}; {expected}")
        marked[place, list(own)] = True
    return marked


def flat(metrics: Mapping[str, Metric]) -> dict[str, float | int | list[float]]:
    """Return metrics by name, their 95 % intervals as `<name>_ci95`, and the number of rows as `n`."""
    values: dict[str, float | int | list[float]] = {}
    for name, metric in metrics.items():
        values |= {name: metric.value, f"{name}_ci95": list(metric.ci95), "n": metric.n}
    return values
