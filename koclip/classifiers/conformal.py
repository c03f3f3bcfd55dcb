"""Thresholds with a promise, from the scores of a calibration set: split conformal prediction.

The promise: of new scores from the same source as the calibration scores, a share of at most alpha lies on the wrong
side of the threshold. It holds for any model and any distribution, for any number of scores, and with equal scores.
It is a mean over calibration sets: with one calibration set, the share can be a little higher or lower. It does not
hold for scores from another source, such as queries in another language.

Sources: Vovk, Gammerman and Shafer 2005 (the method; per class: "Mondrian"); Papadopoulos et al. 2002 (a split of the
data); Angelopoulos and Bates 2021, arXiv 2107.07511 (the order statistic used here); Lee, Barber and Willett 2023,
arXiv 2306.06342 (scores in groups).
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from koclip.config import ConfigError, check

ALPHAS = (0.05, 0.1, 0.2)  # the usual promises


class TooFewScoresError(ConfigError):
    """The calibration set is too small for the promise. `smallest_alpha` is what it can promise."""

    def __init__(self, alpha: float, count: int, name: str) -> None:
        self.smallest_alpha = smallest_alpha(count)
        super().__init__(
            f"alpha: got {alpha:g}, expected {math.ceil(self.smallest_alpha * 1e4) / 1e4:g} or more with the {count} "
            f"calibration scores of {name}; for {alpha:g}, calibrate with {smallest_count(alpha)} or more"
        )


def smallest_alpha(count: int) -> float:
    """Return the smallest alpha that `count` calibration scores can promise, 1 / (count + 1)."""
    return 1 / (count + 1)


def smallest_count(alpha: float) -> int:
    """Return the smallest number of calibration scores that can promise `alpha`, a share above 0 and below 1."""
    return math.ceil(1 / _exact(alpha)) - 1


def highest_without_match(
    scores: torch.Tensor, alpha: float, groups: torch.Tensor | None = None, name: str = "the calibration set"
) -> float:
    """Return the threshold that a share of at most `alpha` of new scores is *above*.

    For retrieval: a score is the best score of a query that has no match. A search that shows only images with a score
    above the threshold, not equal to it, shows something for a share of at most `alpha` of such queries.

    Without groups it is the ceil((n + 1)(1 - alpha))-th smallest of the n scores.

    Args:
        scores: (n,) The calibration scores.
        alpha: The share, above 0 and below 1.
        groups: (n,) The group of each score, such as the image of a caption; groups are independent of each other,
            scores in a group need not be. Each group has the same weight, and the promise is for a random score of a
            new group. Default: each score is a group.
        name: The name of the calibration set in errors.

    Raises:
        TooFewScoresError: there are fewer than 1 / alpha - 1 groups.
        ConfigError: alpha or a score is no such number, or there is no score.
    """
    places = torch.arange(len(scores)) if groups is None else groups.unique(return_inverse=True)[1]
    check(len(scores) > 0, name, "no calibration score", "expected at least one")
    check(len(places) == len(scores), name, f"{len(places)} groups", f"expected one for each of {len(scores)} scores")
    check(bool(scores.isfinite().all()), name, "a score that is not finite", "expected finite scores: check the model")
    sizes = places.bincount().tolist()
    count, unit = len(sizes), math.lcm(*sizes)  # each group weighs `unit`, so that all weights are whole numbers
    needed = (count + 1) * unit * (1 - _exact(alpha))  # the new group weighs as much, and may lie above all others
    if needed > count * unit:
        raise TooFewScoresError(alpha, count, name)
    order = scores.argsort(stable=True)
    totals = itertools.accumulate(unit // sizes[place] for place in places[order].tolist())
    return float(scores[order[next(rank for rank, total in enumerate(totals) if total >= needed)]])


def lowest_with_class(
    scores: torch.Tensor, alpha: float, groups: torch.Tensor | None = None, name: str = "the calibration set"
) -> float:
    """Return the threshold that a share of at most `alpha` of new scores is *below*.

    For classifiers: a score is the score of an image for its own class. If "none of these" is the answer when the
    scores of all classes are below the threshold, a share of at most `alpha` of the images that have a class is
    refused. The arguments and errors are those of `highest_without_match`.
    """
    return -highest_without_match(-scores, alpha, groups, name)


def lowest_per_class(scores: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], alpha: float) -> torch.Tensor:
    """Return a threshold for each class (C,) float64 that holds the promise of `lowest_with_class` for every class.

    "None of these" is the answer when the score of each class is below the threshold of this class.

    Args:
        scores: (n,) The score of each calibration image for its own class.
        labels: (n,) int64, its class.
        classes: The names of the C classes.
        alpha: The share, above 0 and below 1.

    Raises:
        TooFewScoresError: a class has fewer than 1 / alpha - 1 calibration images.
        ConfigError: a class has no calibration image, or another argument is wrong.
    """
    check(len(scores) == len(labels), "calibration labels", len(labels), f"expected {len(scores)}, one for each score")
    wrong = [label for label in labels.unique().tolist() if not 0 <= label < len(classes)]
    check(not wrong, "calibration labels", wrong, f"expected 0 to {len(classes) - 1}")
    counts = labels.bincount(minlength=len(classes)).tolist()
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    check(not absent, "classes without a calibration image", absent[:5], "expected at least one image of every class")
    return torch.tensor(
        [lowest_with_class(scores[labels == label], alpha, name=name) for label, name in enumerate(classes)],
        dtype=torch.float64,
    )


def _exact(alpha: float) -> Fraction:
    """Return the simplest fraction that is meant, 1/20 for 0.05; the binary number would round ranks up or down."""
    share = Fraction(alpha).limit_denominator(10**9) if math.isfinite(alpha) else Fraction(0)
    check(0 < share < 1, "alpha", alpha, "expected a share above 0 and below 1")
    return share
