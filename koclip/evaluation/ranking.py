"""Rank a gallery for many queries, shared among the processes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from koclip import distributed, metrics

Item = TypeVar("Item")
Result = TypeVar("Result")
_QUERIES = 4_096  # ranked at once; always as many, so that the number of processes changes no bit


def search(
    queries: torch.Tensor, gallery: torch.Tensor, positives: Sequence[Sequence[int]], spread: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's rank and its nearest entry (`koclip.metrics.search`), both (Q,).

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: The right entries of each query, at least one.
        spread: Share the queries among the processes, all of which must call this.
    """
    starts = range(0, len(queries), _QUERIES)
    parts = [slice(start, start + _QUERIES) for start in starts]
    results = share(lambda part: metrics.search(queries[part], gallery, positives[part]), parts, spread)
    return torch.cat([ranks for ranks, _ in results]), torch.cat([nearest for _, nearest in results])


def share(work: Callable[[Item], Result], items: Sequence[Item], spread: bool) -> list[Result]:
    """Return the result of every item; if `spread`, the processes share the items, and all must call this."""
    return distributed.share(work, items) if spread else [work(item) for item in items]
