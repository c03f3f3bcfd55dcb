"""Thresholds with a promise: tables by hand, ties, and coverage counted over all splits of small sets."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from koclip.classifiers.conformal import (
    TooFewScoresError,
    highest_without_match,
    lowest_per_class,
    lowest_with_class,
    smallest_alpha,
    smallest_count,
)
from koclip.config import ConfigError

ALPHAS = st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.9])


# The rank is ceil((n + 1)(1 - alpha)); 20 * 0.95 and 10 * 0.9 are whole, and must not be rounded up.
@pytest.mark.parametrize(
    ("count", "alpha", "rank"),
    [
        (19, 0.05, 19),
        (20, 0.05, 20),
        (39, 0.05, 38),
        (9, 0.1, 9),
        (10, 0.1, 10),
        (4, 0.2, 4),
        (99, 0.2, 80),
        (3, 0.5, 2),
    ],
)
def test_ranks_by_hand(count, alpha, rank):
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 1.0  # 1 to n, mixed
    assert highest_without_match(scores, alpha) == rank
    assert lowest_with_class(scores, alpha) == count + 1 - rank


def test_equal_scores_count_as_not_above():
    scores = torch.tensor([0.1, 0.3, 0.3, 0.3])
    assert highest_without_match(scores, 0.2) == scores[1]
    assert not bool((scores > highest_without_match(scores, 0.2)).any())
    assert not bool((scores < lowest_with_class(scores, 0.2)).any())


def test_groups_by_hand():
    # Three images: captions (1, 2), (3), (4, 5, 6, 7), each image weighs 1/4 of four. For alpha 0.5, a weight of 1/2 is
    # needed: 1/8 + 1/8 + 1/4 = 1/2 is reached at 3. For alpha 0.3, 0.7 - 0.5 = 0.2 of 1/16 each: at the fourth, 7.
    scores, groups = torch.tensor([5.0, 1, 3, 4, 2, 6, 7]), torch.tensor([9, 2, 4, 9, 2, 9, 9])
    assert highest_without_match(scores, 0.5, groups) == 3
    assert highest_without_match(scores, 0.3, groups) == 7
    assert highest_without_match(scores, 0.4, groups) == 5


@given(st.lists(st.integers(0, 6), min_size=2, max_size=14), ALPHAS)
def test_coverage_over_all_splits(values, alpha):
    """Each value in turn is the new one: that is how the promise is proved, so the count must keep it exactly."""
    scores = torch.tensor(values, dtype=torch.float32)
    rest = [torch.cat([scores[:new], scores[new + 1 :]]) for new in range(len(scores))]
    if alpha < 1 / len(scores):
        for others in rest:
            with pytest.raises(TooFewScoresError):
                highest_without_match(others, alpha)
        return
    above = sum(float(new) > highest_without_match(others, alpha) for new, others in zip(scores, rest, strict=True))
    below = sum(float(new) < lowest_with_class(others, alpha) for new, others in zip(scores, rest, strict=True))
    promised = math.floor(Fraction(alpha).limit_denominator(100) * len(scores))
    assert max(above, below) <= promised
    if len(set(values)) == len(values):  # without ties, not one fewer than the promise allows
        assert above == below == promised


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=2, max_size=8), ALPHAS)
def test_coverage_over_all_splits_of_groups(values, alpha):
    if alpha < 1 / len(values):
        return
    shares = []
    for new, own in enumerate(values):
        others = [(score, group) for group, scores in enumerate(values) if group != new for score in scores]
        scores, groups = (torch.tensor(part) for part in zip(*others, strict=True))
        threshold = highest_without_match(scores.float(), alpha, groups)
        shares.append(Fraction(sum(score > threshold for score in own), len(own)))
    assert sum(shares) / len(shares) <= Fraction(alpha).limit_denominator(100)


@given(st.permutations(range(6)), ALPHAS)
def test_groups_of_equal_size_one_are_no_groups(order, alpha):
    scores, groups = torch.tensor(order).float(), torch.arange(6)
    if alpha >= 1 / 7:
        assert highest_without_match(scores, alpha, groups) == highest_without_match(scores, alpha)


def test_coverage_by_simulation():
    """2,000 calibration sets of 30: the mean share of new scores above the threshold is floor(31 alpha) / 31."""
    draw = torch.Generator().manual_seed(0)
    for alpha in (0.05, 0.1, 0.2):
        shares = []
        for _ in range(2_000):
            threshold = highest_without_match(torch.randn(30, generator=draw), alpha)
            shares.append(0.5 * math.erfc(threshold / math.sqrt(2)))  # P(N(0, 1) > threshold)
        expected = math.floor(31 * alpha) / 31
        assert sum(shares) / len(shares) == pytest.approx(expected, abs=4 * 0.075 / math.sqrt(2_000))


def test_every_class_keeps_its_promise():
    scores, labels = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3]), torch.tensor([0, 1, 0, 1, 0, 1])
    assert lowest_per_class(scores, labels, ["개", "dog"], 0.25).tolist() == pytest.approx([0.7, 0.1])
    assert lowest_per_class(scores, labels, ["개", "dog"], 0.5).tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("count", [1, 2, 9, 18, 19, 20, 99])
def test_the_smallest_promise(count):
    alpha = smallest_alpha(count)
    assert smallest_count(alpha) == count
    scores = torch.arange(count).float()
    with pytest.raises(TooFewScoresError) as error:
        highest_without_match(scores, alpha * 0.99)
    assert error.value.smallest_alpha == alpha
    assert highest_without_match(scores, alpha) == count - 1


FINE = torch.arange(30).float()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: highest_without_match(FINE[:9], 0.05), ["alpha", "0.05", "0.1 ", "9 ", "19"]),
        (lambda: highest_without_match(FINE[:0], 0.05), ["calibration", "no "]),
        (lambda: highest_without_match(FINE, 0.0), ["alpha", "0.0"]),
        (lambda: highest_without_match(FINE, 1.0), ["alpha", "1.0"]),
        (lambda: highest_without_match(FINE, math.nan), ["alpha", "nan"]),
        (lambda: highest_without_match(FINE, 1e-12), ["alpha", "1e-12"]),
        (lambda: highest_without_match(FINE / 0, 0.1), ["finite"]),
        (lambda: highest_without_match(FINE, 0.1, torch.arange(29)), ["29", "30"]),
        (lambda: lowest_per_class(FINE, torch.zeros(30).long(), ["개", "고양이"], 0.1), ["고양이"]),
        (lambda: lowest_per_class(FINE, (FINE > 25).long(), ["개", "고양이"], 0.1), ["고양이", "0.2 ", "4 "]),
        (lambda: lowest_per_class(FINE, torch.full((30,), 2), ["개", "고양이"], 0.1), ["labels", "2"]),
        (lambda: lowest_per_class(FINE, torch.zeros(3).long(), ["개"], 0.1), ["labels", "30"]),
    ],
)
def test_bad_input_has_an_error_with_the_values(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
