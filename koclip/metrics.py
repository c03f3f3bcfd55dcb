"""Retrieval and classification metrics: matrices in, numbers with intervals out. No model, no data set.

Letters in shape comments: Q queries, G gallery entries, P the most positives of a query, D embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from koclip import installation

installation.require("eval")
from scipy.stats import binomtest, bootstrap, hypergeom, kendalltau  # noqa: E402

Numbers = npt.NDArray[np.float64]

KS = (1, 5, 10)
_RESAMPLES = 1_000
_DRAWN_AT_ONCE = 1_000_000  # numbers that the bootstrap draws at a time; 8 MB
_BINS = 15  # of the calibration error
_CHUNK = 16_000_000  # similarities in memory at a time; 64 MB


class Queries(NamedTuple):
    """The value of each query (Q,), and the group of each (Q,), such as the image of a caption; None: no groups."""

    values: torch.Tensor
    groups: torch.Tensor | None = None


class Gallery(NamedTuple):
    """The number of entries that queries are searched in, and each query's number of positives, (Q,)."""

    size: int
    positives: Sequence[int]

    def chance(self, k: int) -> float:
        """Return the share of queries with a positive among the first `k` entries of a random order."""
        return float(np.mean(hypergeom.sf(0, self.size, np.asarray(self.positives), min(k, self.size))))


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval, measured on `n` queries. Shares are 0 to 1.

    A mean over queries keeps `queries`, so that two models can be compared query by query (`gained`, `kept`).
    `chance` is the expected value of random answers. Neither is written to results.json.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    queries: Queries | None = field(default=None, compare=False, repr=False)
    chance: float | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Return the entry for results.json."""
        return {"value": self.value, "ci95": list(self.ci95), "n": self.n}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metric":
        """Return the metric in an entry of results.json."""
        low, high = values["ci95"]
        return cls(values["value"], (low, high), values["n"])


def share(hits: torch.Tensor, chance: float | None = None) -> Metric:
    """Return the share of true entries of `hits` (Q,) with Wilson's interval (1927), for independent queries.

    `chance` is the expected share of random answers.

    Raises:
        ValueError: there are no queries.
    """
    count, total = int(hits.sum()), len(hits)
    _check_count(total)
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return Metric(count / total, (float(interval.low), float(interval.high)), total, Queries(hits), chance)


def mean(values: torch.Tensor, groups: torch.Tensor | None = None) -> Metric:
    """Return the mean of `values` (Q,) with its bootstrap interval; also of paired differences, a - b.

    Percentile bootstrap (Efron 1979) with 1,000 resamples of whole groups, drawn with a fixed seed.

    Args:
        values: One number per query.
        groups: (Q,) Group of each query, such as the image of a caption. Default: each query is a group.

    Raises:
        ValueError: there are fewer than two groups.
    """
    numbers = values.double().numpy()
    places = _places(numbers, groups)
    sums, sizes = np.bincount(places, numbers), np.bincount(places)
    interval = _bootstrap(len(sizes), lambda weights: float(weights @ sums / (weights @ sizes)))
    return Metric(float(numbers.mean()), interval, len(numbers), Queries(values, groups))


def gained(before: Metric, after: Metric) -> Metric:
    """Return the mean of `after` minus that of `before`, paired: both are means over the same queries; see `mean`.

    Raises:
        ValueError: a metric has no queries, or their numbers differ.
    """
    first, second = _paired(before, after)
    return mean(second.values.double() - first.values.double(), first.groups)


def kept(before: Metric, after: Metric) -> Metric:
    """Return the mean of `after` as a share of that of `before`, paired, with its bootstrap interval; see `mean`.

    Raises:
        ValueError: a metric has no queries, their numbers differ, or all values of `before` are 0.
    """
    first, second = _paired(before, after)
    numbers, others = first.values.double().numpy(), second.values.double().numpy()
    if not numbers.sum():
        raise ValueError("all values of the first metric are 0, expected some above 0 to compare with")
    places = _places(numbers, first.groups)
    sums, other_sums = np.bincount(places, numbers), np.bincount(places, others)

    def ratio(weights: Numbers) -> float:
        return float(weights @ other_sums) / max(float(weights @ sums), 0.5)  # half a hit if a resample has none

    return Metric(float(others.sum() / numbers.sum()), _bootstrap(len(sums), ratio), len(numbers))


def _paired(before: Metric, after: Metric) -> tuple[Queries, Queries]:
    if before.queries is None or after.queries is None:
        raise ValueError("got a metric without its queries, expected means over queries: only they can be paired")
    _check_lengths(len(before.queries.values), len(after.queries.values), "values of the second metric")
    return before.queries, after.queries


def difference(first: torch.Tensor, second: torch.Tensor) -> Metric:
    """Return the mean of `first` (Q,) minus the mean of `second` (R,), for different queries; bootstrap over both.

    Raises:
        ValueError: `first` or `second` has fewer than two queries.
    """
    numbers, others = first.double().numpy(), second.double().numpy()
    _check_count(min(len(numbers), len(others)), least=2)
    interval = bootstrap(
        (numbers, others),
        lambda drawn, drawn_others, axis: drawn.mean(axis) - drawn_others.mean(axis),
        **_options(len(numbers) + len(others)),
    ).confidence_interval
    value = float(numbers.mean() - others.mean())
    return Metric(value, (float(interval.low), float(interval.high)), len(numbers) + len(others))


def median(values: torch.Tensor, groups: torch.Tensor | None = None) -> Metric:
    """Return the (lower) median of `values` (Q,) with its bootstrap interval; see `mean`."""
    numbers = values.double().numpy()
    places = _places(numbers, groups)
    order = np.argsort(numbers, kind="stable")
    ordered, owners = numbers[order], places[order]

    def middle(weights: Numbers) -> float:
        total = np.cumsum(weights[owners])
        return float(ordered[np.searchsorted(total, total[-1] / 2)])

    return Metric(middle(np.ones(places.max() + 1)), _bootstrap(places.max() + 1, middle), len(numbers))


def mean_per_class(hits: torch.Tensor, labels: torch.Tensor) -> Metric:
    """Return the mean over classes of the share of true `hits` (Q,); the bootstrap resamples queries.

    The mean of a resample leaves out classes without queries.
    """
    numbers, owners = hits.double().numpy(), np.unique(labels.numpy(), return_inverse=True)[1]
    _check_count(len(numbers))
    _check_lengths(len(numbers), len(owners), "labels")

    def per_class(weights: Numbers) -> float:
        sizes = np.bincount(owners, weights)
        return float((np.bincount(owners, weights * numbers) / np.maximum(sizes, 1))[sizes > 0].mean())

    interval = _bootstrap(len(numbers), per_class)
    return Metric(per_class(np.ones(len(numbers))), interval, len(numbers))


def calibration_error(confidences: torch.Tensor, hits: torch.Tensor) -> Metric:
    """Return the expected calibration error, 0 to 1, with its bootstrap interval.

    It is the mean distance between confidence and share of hits in 15 equal steps of the confidence, weighted by the
    number of queries (Guo et al. 2017). Even a calibrated model has an error above 0: with few queries more.

    Args:
        confidences: (Q,) Probabilities of the answers.
        hits: (Q,) Whether the answers are right.
    """
    _check_lengths(len(confidences), len(hits), "hits")
    numbers = confidences.double().numpy()
    gaps = hits.double().numpy() - numbers
    places = np.minimum((numbers * _BINS).astype(np.int64), _BINS - 1)

    def distance(weights: Numbers) -> float:
        return float(np.abs(np.bincount(places, weights * gaps, minlength=_BINS)).sum() / weights.sum())

    return Metric(distance(np.ones(len(gaps))), _bootstrap(len(gaps), distance), len(gaps))


def agreement(scores: torch.Tensor, ratings: torch.Tensor, variant: str = "c") -> Metric:
    """Return Kendall's tau between `scores` and `ratings` (Q,), -1 to 1, with its bootstrap interval.

    Args:
        scores: Scores of the model.
        ratings: Human ratings. An item with several ratings occurs several times, as in Flickr8k-Expert.
        variant: `c` (Stuart 1953), as in published tables of image captions, or `b` (Kendall 1945).

    Raises:
        ValueError: scores or ratings are constant or not finite, they differ in length, or there are fewer than two.
    """
    scored, rated = scores.double().numpy(), ratings.double().numpy()
    _check_count(len(scored))
    _check_lengths(len(scored), len(rated), "ratings")
    if not (np.isfinite(scored).all() and np.isfinite(rated).all()):
        raise ValueError("got NaN or infinity among the scores or ratings, expected finite numbers")
    if len(np.unique(scored)) < 2 or len(np.unique(rated)) < 2:
        raise ValueError(f"all {len(scored)} scores, or all ratings, are equal: they have no order to compare")

    def tau(weights: Numbers) -> float:
        drawn = np.repeat(np.arange(len(scored)), weights.astype(np.int64))
        statistic = kendalltau(scored[drawn], rated[drawn], variant=variant).statistic
        return float(np.nan_to_num(statistic))  # 0 for a resample with equal ratings

    return Metric(tau(np.ones(len(scored))), _bootstrap(len(scored), tau), len(scored))


def first_ranks(similarity: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Return the number of gallery entries before each query's best positive, (Q,); 0 is a hit at 1.

    An entry with the same similarity as the best positive counts as before it, so that a constant model scores 0.

    Args:
        similarity: (Q, G).
        positives: (Q, G) bool, at least one true per row.

    Raises:
        ValueError: a similarity is not finite, or a query has no positive.
    """
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("the similarities contain NaN or infinity; the model's embeddings are broken")
    if not bool(positives.any(dim=1).all()):
        raise ValueError("a query without any positive in the gallery cannot be ranked")
    best = similarity.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)  # (Q, 1)
    return ((similarity >= best) & ~positives).sum(dim=1)


def search(
    queries: torch.Tensor, gallery: torch.Tensor, positives: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's rank, as in `first_ranks`, and its nearest entry, both (Q,), in bounded memory.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: The correct entries of each query, at least one.

    Raises:
        ValueError: there are no queries, a similarity is not finite, or a query has no positive.
    """
    _check_count(len(queries))
    if not all(positives):
        raise ValueError("a query without any positive in the gallery cannot be ranked")
    rows = min(len(queries), max(1, _CHUNK // max(1, len(gallery))))
    # One buffer for all chunks: memory that is freed and allocated again may grow to gigabytes.
    similarities = queries.new_empty(rows, len(gallery))
    not_beaten = torch.empty(rows, len(gallery), dtype=torch.bool)
    ranks, nearest = (torch.empty(len(queries), dtype=torch.long) for _ in range(2))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        count = len(queries[part])
        similarity = torch.mm(queries[part], gallery.T, out=similarities[:count])  # (q, G)
        # The sum is not finite if a term is not, and takes a twentieth of the time of checking each term.
        if not bool(similarity.sum().isfinite()) and not bool(torch.isfinite(similarity).all()):
            raise ValueError("the similarities contain NaN or infinity; the model's embeddings are broken")
        owned = [list(dict.fromkeys(own)) for own in positives[part]]
        longest = max(map(len, owned))
        places = torch.tensor([[*own, *[-1] * (longest - len(own))] for own in owned])  # (q, P)
        scores = similarity.gather(1, places.clamp(min=0)).masked_fill(places < 0, float("-inf"))
        best = scores.amax(dim=1, keepdim=True)
        ahead = torch.ge(similarity, best, out=not_beaten[:count]).numpy()
        # Counting with torch takes four times as long.
        ranks[part] = torch.from_numpy(np.count_nonzero(ahead, axis=1)) - (scores >= best).sum(dim=1)
        nearest[part] = similarity.argmax(dim=1)
    return ranks, nearest


def recall_at(
    ranks: torch.Tensor,
    groups: torch.Tensor | None = None,
    ks: Sequence[int] = KS,
    gallery: Gallery | None = None,
) -> dict[str, Metric]:
    """Return recall@k, the share of queries with a positive among their k nearest, and the median rank from 1.

    The definition of recall is CLIP_benchmark's. `ranks` (Q,) are those of `first_ranks` or `search`; for `groups` see
    `mean`. With a `gallery`, each recall has its `chance`.
    """
    recalls = {}
    for k in ks:
        hits = ranks < k
        if 0 < int(hits.sum()) < len(hits):
            recalls[f"recall@{k}"] = mean(hits, groups)
        else:  # all resamples would be equal; use Wilson's interval for one query per group
            first_of_each = hits if groups is None else hits[: len(groups.unique())]
            recalls[f"recall@{k}"] = replace(share(first_of_each), n=len(hits), queries=Queries(hits, groups))
        if gallery is not None:
            recalls[f"recall@{k}"] = replace(recalls[f"recall@{k}"], chance=gallery.chance(k))
    return recalls | {"median_rank": median(ranks + 1, groups)}


def _places(numbers: Numbers, groups: torch.Tensor | None) -> npt.NDArray[np.int64]:
    """Return the number of each query's group, from 0 without gaps."""
    _check_count(len(numbers))
    if groups is None:
        return np.arange(len(numbers))
    _check_lengths(len(numbers), len(groups), "groups")
    return np.unique(groups.numpy(), return_inverse=True)[1]


def _check_count(count: int, least: int = 1) -> None:
    if count < least:
        raise ValueError(f"number of queries, or of groups of queries: got {count}, expected at least {least}")


def _check_lengths(count: int, other: int, name: str) -> None:
    if count != other:
        raise ValueError(f"got {other} {name} for {count} queries, expected one each")


def _bootstrap(count: int, statistic: Callable[[Numbers], float]) -> tuple[float, float]:
    """Return the 95 % interval of a statistic; its argument is how often each of `count` groups is drawn."""
    _check_count(count, least=2)
    interval = bootstrap(
        (np.arange(count),),
        lambda drawn: statistic(np.bincount(drawn, minlength=count).astype(np.float64)),
        vectorized=False,
        **_options(count),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _options(count: int) -> dict[str, Any]:
    """Return the options of a bootstrap over `count` items: a fixed seed and bounded memory."""
    rng = np.random.default_rng(0)
    return {"n_resamples": _RESAMPLES, "batch": max(1, _DRAWN_AT_ONCE // count), "method": "percentile", "rng": rng}
