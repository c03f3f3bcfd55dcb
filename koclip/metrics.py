"""Retrieval and classification metrics: matrices in, floats out. No model, no data set."""

from dataclasses import asdict, dataclass

import torch
from scipy.stats import binomtest


@dataclass(frozen=True)
class Metric:
    """A share of `n` queries (0 to 1) with its 95 % interval (Wilson 1927; queries taken as independent)."""

    value: float
    ci95: tuple[float, float]
    n: int

    def to_dict(self) -> dict[str, object]:
        """Return the entry of results.json."""
        return {**asdict(self), "ci95": list(self.ci95)}


def share(hits: torch.Tensor) -> Metric:
    """Return the share of true entries of `hits` (Q,).

    Raises:
        ValueError: there is no query.
    """
    count, total = int(hits.sum()), len(hits)
    if total == 0:
        raise ValueError("no queries: a share of nothing is not a number")
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return Metric(count / total, (float(interval.low), float(interval.high)), total)


def first_ranks(similarity: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Return how many gallery entries beat each query's best positive, (Q,); 0 is a hit at 1.

    An entry that ties with the best positive counts as beating it, so that a constant model scores nothing.

    Args:
        similarity: (Q, G).
        positives: (Q, G) bool, at least one true per row.
    """
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("the similarity matrix holds NaN or infinity; the model's embeddings are broken")
    if not bool(positives.any(dim=1).all()):
        raise ValueError("a query without any positive in the gallery cannot be ranked")
    best = similarity.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)  # (Q, 1)
    return ((similarity >= best) & ~positives).sum(dim=1)


def recall_at(similarity: torch.Tensor, positives: torch.Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Metric]:
    """Return recall@k: the share of queries with a positive among their k nearest (CLIP_benchmark's definition).

    Args:
        similarity: (Q, G).
        positives: (Q, G) bool.
        ks: The ks.
    """
    ranks = first_ranks(similarity, positives)
    return {f"recall@{k}": share(ranks < k) for k in ks}
