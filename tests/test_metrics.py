import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, kendalltau, ttest_ind
from sklearn.metrics import balanced_accuracy_score

from koclip import metrics
from koclip.metrics import (
    agreement,
    difference,
    first_ranks,
    mean,
    mean_per_class,
    median,
    recall_at,
    search,
    share,
)

# Four queries against four gallery entries; the second query has two positives, the fourth ties with a negative.
SIMILARITY = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.8, 0.5, 0.7, 0.1],
        [0.6, 0.5, 0.4, 0.3],
        [0.2, 0.7, 0.1, 0.7],
    ]
)
POSITIVES = torch.tensor(
    [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, True],
        [False, False, False, True],
    ]
)


def test_ranks_by_hand():
    # Query 1: 0.7 is beaten by 0.8. Query 2: 0.3 is beaten by three. Query 3: 0.7 ties with a wrong 0.7.
    assert first_ranks(SIMILARITY, POSITIVES).tolist() == [0, 1, 3, 1]


def test_recall_by_hand():
    recalls = recall_at(first_ranks(SIMILARITY, POSITIVES), ks=(1, 2, 4))
    assert {name: metric.value for name, metric in recalls.items()} == {
        "recall@1": 0.25,
        "recall@2": 0.75,
        "recall@4": 1.0,
        "median_rank": 2.0,
    }
    assert recalls["recall@1"].n == 4


def test_a_constant_model_scores_nothing():
    assert recall_at(first_ranks(torch.zeros(5, 5), torch.eye(5).bool()), ks=(1,))["recall@1"].value == 0.0


def test_permuting_the_gallery_changes_nothing():
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(first_ranks(SIMILARITY[:, order], POSITIVES[:, order]), first_ranks(SIMILARITY, POSITIVES))


def test_wilson_interval_by_hand():
    # 8 of 10: Wilson's interval is (0.4902, 0.9433) (Brown, Cai, DasGupta 2001, formula 4).
    metric = share(torch.tensor([True] * 8 + [False] * 2))
    assert metric.value == 0.8
    assert metric.ci95 == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize(
    ("similarity", "positives", "word"),
    [
        (torch.full((2, 2), float("nan")), torch.eye(2).bool(), "NaN"),
        (torch.zeros(2, 2), torch.zeros(2, 2).bool(), "without any positive"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, positives, word):
    with pytest.raises(ValueError, match=word):
        first_ranks(similarity, positives)


def test_no_queries_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        share(torch.zeros(0).bool())


# Four images against eight captions, two per image: caption c is of image c // 2.
TABLE = torch.tensor(
    [
        # c0   c1   c2   c3   c4   c5   c6   c7
        [0.9, 0.3, 0.5, 0.9, 0.1, 0.2, 0.4, 0.6],  # own: c0, c1
        [0.8, 0.3, 0.7, 0.2, 0.1, 0.5, 0.6, 0.4],  # own: c2, c3
        [0.1, 0.3, 0.7, 0.6, 0.2, 0.5, 0.3, 0.8],  # own: c4, c5
        [0.2, 0.3, 0.4, 0.6, 0.9, 0.5, 0.3, 0.3],  # own: c6, c7
    ]
)
# Captions: c0's 0.9 is the highest. c1's 0.3 ties with three. c2's 0.7 ties with one. c3's 0.2 is below three. c4's 0.2
# is below 0.9. c5's 0.5 ties with two. c6's 0.3 is below 0.4 and 0.6 and ties with one. c7's 0.3 is below three.
CAPTION_RANKS = [0, 3, 1, 3, 1, 2, 3, 3]
# Images: 0.9 (c0) ties with c3. 0.7 (c2) is below c0. 0.5 (c5) is below c2, c3 and c7. 0.3 (c6 and c7, which do not
# count against each other) is below c2, c3, c4 and c5 and ties with c1.
IMAGE_RANKS = [1, 1, 3, 5]
OWN = torch.tensor([[caption // 2 == image for caption in range(8)] for image in range(4)])


@pytest.mark.parametrize("chunk", [1, 8, 1_000])
def test_four_images_and_eight_captions_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    assert first_ranks(TABLE.T, OWN.T).tolist() == CAPTION_RANKS
    assert first_ranks(TABLE, OWN).tolist() == IMAGE_RANKS
    ranks, nearest = search(TABLE.T, torch.eye(4), [[caption // 2] for caption in range(8)])
    assert ranks.tolist() == CAPTION_RANKS
    assert nearest[[0, 3, 4, 6, 7]].tolist() == [0, 0, 3, 1, 2]  # those of the captions without a tie at the top
    ranks, nearest = search(TABLE, torch.eye(8), [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert ranks.tolist() == IMAGE_RANKS
    assert nearest[1:].tolist() == [0, 7, 4]


def test_recalls_of_four_images_and_eight_captions_by_hand():
    recalls = recall_at(torch.tensor(CAPTION_RANKS), torch.arange(8) // 2, ks=(1, 2, 3, 4))
    # Median rank from 1: the fourth of 1, 2, 2, 3, 4, 4, 4, 4.
    assert [metric.value for metric in recalls.values()] == [1 / 8, 3 / 8, 4 / 8, 1.0, 3.0]
    recalls = recall_at(torch.tensor(IMAGE_RANKS), ks=(1, 2, 4, 5, 6))
    # The second of 2, 2, 4, 6.
    assert [metric.value for metric in recalls.values()] == [0.0, 0.5, 0.75, 0.75, 1.0, 2.0]


@pytest.mark.parametrize("chunk", [1, 50, 130, 1_000, 16_000_000])
@pytest.mark.parametrize("seed", range(5))
def test_search_is_first_ranks(monkeypatch, chunk, seed):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = (torch.randint(-2, 3, (count, 3), generator=generator).float() for count in (37, 50))
    counts = torch.randint(1, 9, (37,), generator=generator).tolist()
    positives = [torch.randperm(50, generator=generator)[:count].tolist() for count in counts]
    marked = torch.zeros(37, 50, dtype=torch.bool)
    for query, own in enumerate(positives):
        marked[query, own] = True
    ranks, nearest = search(queries, gallery, positives)
    similarity = queries @ gallery.T
    assert torch.equal(ranks, first_ranks(similarity, marked))
    assert torch.equal(similarity.gather(1, nearest[:, None])[:, 0], similarity.amax(dim=1))


def test_an_entry_that_is_listed_twice_counts_once():
    gallery = torch.tensor([[1.0], [2.0], [3.0]])
    assert search(torch.ones(2, 1), gallery, [[1, 1], [2, 2, 0]])[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("queries", "positives", "word"),
    [
        (torch.ones(2, 1), [[0], []], "without any positive"),
        (torch.full((2, 1), float("inf")), [[0], [1]], "NaN or infinity"),
        (torch.full((2, 1), float("nan")), [[0], [1]], "NaN or infinity"),
        (torch.ones(0, 1), [], "got 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, positives, word):
    with pytest.raises(ValueError, match=word):
        search(queries, torch.ones(3, 1), positives)


def test_mean_and_median_by_hand():
    values = torch.tensor([4.0, 1.0, 2.0, 2.0])
    assert mean(values).value == 2.25
    assert median(values).value == 2.0
    assert median(torch.tensor([5, 3])).value == 3.0  # the lower one
    assert median(torch.tensor([9, 3, 5])).value == 5.0
    assert mean(torch.tensor([True, False, False, True])) == mean(torch.tensor([1.0, 0.0, 0.0, 1.0]))


def test_of_two_groups_a_resample_has_one_or_both():
    # Means of (1, 1, 1), of (1, 1, 1, 0) and of (0): 1, 0.75, 0; their shares 1/4, 1/2, 1/4 make 0 and 1 the 95 %.
    metric = mean(torch.tensor([1, 1, 1, 0]), torch.tensor([7, 7, 7, -2]))
    assert (metric.value, metric.ci95, metric.n) == (0.75, (0.0, 1.0), 4)
    assert median(torch.tensor([1, 1, 1, 0]), torch.tensor([7, 7, 7, -2])).ci95 == (0.0, 1.0)


def test_intervals_are_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=300)
    reference = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    assert mean(torch.tensor(values)).ci95 == pytest.approx(reference.confidence_interval, abs=0.02)
    reference = bootstrap((values,), np.median, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    assert median(torch.tensor(values)).ci95 == pytest.approx(reference.confidence_interval, abs=0.03)


def test_a_grouped_interval_is_that_of_the_groups_means():
    # Groups of equal size and of equal values: as if each were one query.
    values = torch.rand(80, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(80).repeat_interleave(5)
    assert mean(values.repeat_interleave(5), groups).ci95 == pytest.approx(mean(values).ci95, abs=1e-12)
    assert median(values.repeat_interleave(5), groups).ci95 == median(values).ci95


def test_intervals_are_the_same_at_every_call_and_in_any_batch(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    first = mean(values)
    assert mean(values) == first
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 1)
    assert mean(values) == first


def clustered(rng: np.random.Generator, num_images: int = 60, captions: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hits and their images; an image's captions succeed together, half of all on average."""
    hits = rng.random((num_images, captions)) < rng.random((num_images, 1))
    return torch.tensor(hits.flatten()), torch.arange(num_images).repeat_interleave(captions)


def test_ninety_five_percent_of_grouped_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(metrics, "_RESAMPLES", 200)
    rng = np.random.default_rng(0)
    grouped, ungrouped, widths = 0, 0, []
    for _ in range(200):
        hits, images = clustered(rng)
        low, high = mean(hits, images).ci95
        own_low, own_high = mean(hits).ci95
        grouped += low <= 0.5 <= high
        ungrouped += own_low <= 0.5 <= own_high
        widths.append((high - low) / (own_high - own_low))
    assert 180 <= grouped <= 198
    assert ungrouped < 175  # which is why there are groups
    # Variance of a mean of 5 with an intraclass correlation of (1/12) / (1/4): 1 + 4/3 times as high.
    assert np.median(widths) == pytest.approx((7 / 3) ** 0.5, rel=0.05)


def test_ninety_five_percent_of_the_other_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(metrics, "_RESAMPLES", 200)
    rng = np.random.default_rng(0)
    held = {"share": 0, "difference": 0, "median": 0, "mean_per_class": 0}
    for _ in range(200):
        first, second = torch.tensor(rng.random(120) < 0.7), torch.tensor(rng.random(80) < 0.4)
        labels = torch.tensor(np.repeat([0, 1], [120, 80]))
        intervals = {
            "share": (share(first), 0.7),
            "difference": (difference(first, second), 0.3),
            "median": (median(torch.tensor(rng.normal(size=100))), 0.0),
            "mean_per_class": (mean_per_class(torch.cat([first, second]), labels), 0.55),
        }
        for name, (metric, truth) in intervals.items():
            held[name] += metric.ci95[0] <= truth <= metric.ci95[1]
    assert all(180 <= count <= 198 for count in held.values()), held


def test_mean_per_class_by_hand_and_as_scikit_learn_has_it():
    hits, labels = torch.tensor([True, True, False, True, False, False]), torch.tensor([3, 3, 3, 3, 5, 9])
    metric = mean_per_class(hits, labels)
    assert metric.value == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert metric.n == 6
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 7, 200)
    answers = np.where(rng.random(200) < 0.5, truth, rng.integers(0, 7, 200))
    metric = mean_per_class(torch.tensor(truth == answers), torch.tensor(truth))
    assert metric.value == pytest.approx(balanced_accuracy_score(truth, answers), abs=1e-12)
    assert metric.ci95[0] < metric.value < metric.ci95[1]


def test_difference_by_hand_and_as_scipy_has_it():
    metric = difference(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1]))
    assert (metric.value, metric.n) == (0.25, 6)
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 1, 300), rng.normal(0, 2, 200)
    metric = difference(torch.tensor(first), torch.tensor(second))
    welch = ttest_ind(first, second, equal_var=False).confidence_interval()
    assert metric.ci95 == pytest.approx((welch.low, welch.high), abs=0.04)
    assert difference(torch.ones(3), torch.ones(4)).ci95 == (0.0, 0.0)


def test_agreement_by_hand_and_as_scipy_has_it():
    # Pairs of (1, 1), (2, 1), (3, 2), (4, 2): four agree, none disagrees, two tie in the ratings.
    scores, ratings = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 1, 2, 2])
    # c: 2 (4 - 0) / (4^2 (2 - 1) / 2), b: (4 - 0) / sqrt(6 * 4)
    assert agreement(scores, ratings).value == pytest.approx(1.0)
    assert agreement(scores, ratings, variant="b").value == pytest.approx(4 / 24**0.5)
    assert agreement(-scores, ratings).value == pytest.approx(-1.0)
    rng = np.random.default_rng(0)
    people = rng.integers(1, 5, 80)
    noisy = people + 2 * rng.normal(size=80)
    for variant in ("b", "c"):
        metric = agreement(torch.tensor(noisy), torch.tensor(people), variant)
        assert metric.value == pytest.approx(kendalltau(noisy, people, variant=variant).statistic, abs=1e-12)
        assert metric.ci95[0] < metric.value < metric.ci95[1]


def test_where_all_or_none_hit_the_interval_is_wilsons_of_the_groups():
    # Wilson's interval of 10 of 10: from 1 / (1 + z^2 / 10), z = 1.96.
    for hit in (True, False):
        ranks = torch.full((10,), 0 if hit else 7)
        far = 1 / (1 + 1.959964**2 / 10)
        wilson = (far, 1.0) if hit else (0.0, 1 - far)
        alone = recall_at(ranks, ks=[1])["recall@1"]
        assert alone.value == float(hit)
        assert alone.ci95 == pytest.approx(wilson, abs=1e-6)
        # Five captions each of the same ten images tell no more than ten do.
        grouped = recall_at(ranks.repeat(5), torch.arange(10).repeat(5), ks=[1])["recall@1"]
        assert (grouped.value, grouped.n) == (float(hit), 50)
        assert grouped.ci95 == pytest.approx(wilson, abs=1e-6)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: mean(torch.zeros(0)), "got 0"),
        (lambda: median(torch.zeros(0)), "got 0"),
        (lambda: mean_per_class(torch.zeros(0), torch.zeros(0)), "got 0"),
        (lambda: difference(torch.zeros(3), torch.zeros(0)), "got 0"),
        (lambda: agreement(torch.zeros(0), torch.zeros(0)), "got 0"),
        (lambda: recall_at(torch.zeros(0)), "got 0"),
        (lambda: mean(torch.ones(1)), "got 1, .* 2"),
        (lambda: mean(torch.ones(4), torch.zeros(4)), "got 1, .* 2"),
        (lambda: median(torch.ones(1)), "got 1, .* 2"),
        (lambda: mean_per_class(torch.ones(1), torch.ones(1)), "got 1, .* 2"),
        (lambda: difference(torch.ones(1), torch.ones(5)), "got 1, .* 2"),
        (lambda: agreement(torch.ones(5), torch.arange(5)), "no order"),
        (lambda: agreement(torch.arange(5), torch.ones(5)), "no order"),
        (lambda: agreement(torch.tensor([0.1, float("nan"), 0.3]), torch.arange(3)), "NaN or infinity"),
        (lambda: agreement(torch.arange(3), torch.arange(4)), "got 4 .* 3 "),
        (lambda: mean(torch.arange(3), torch.arange(4)), "got 4 .* 3 "),
        (lambda: median(torch.arange(3), torch.arange(4)), "got 4 .* 3 "),
        (lambda: mean_per_class(torch.arange(3), torch.arange(4)), "got 4 .* 3 "),
    ],
)
def test_what_has_no_interval_is_refused(measure, message):
    with pytest.raises(ValueError, match=message):
        measure()


def test_what_all_are_alike_has_an_interval_without_width():
    assert mean(torch.full((5,), 0.5)).ci95 == (0.5, 0.5)
    assert median(torch.full((5,), 3)).ci95 == (3.0, 3.0)
    assert mean_per_class(torch.ones(5).bool(), torch.tensor([0, 0, 1, 1, 2])).ci95 == (1.0, 1.0)


def test_a_metric_is_an_entry_of_results_json():
    assert share(torch.tensor([True, False])).to_dict() == {
        "value": 0.5,
        "ci95": [pytest.approx(0.0945, abs=1e-4), pytest.approx(0.9055, abs=1e-4)],
        "n": 2,
    }


MEMORY = """
import resource, sys, torch
from koclip.metrics import recall_at, search
count = int(sys.argv[1])
images = torch.nn.functional.normalize(torch.randn(count, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
texts = images + 0.1 * torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
owned = [[one] for one in range(count)]
recall_at(search(texts[:10], images, owned[:10])[0], torch.arange(10) // 2)  # what loads or is set up once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ranks = search(texts, images, owned)[0]
for groups in (torch.arange(count) // 5, None):
    recall_at(ranks, groups)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("count", "megabytes"), [(16_000, 300), pytest.param(50_000, 1_000, marks=pytest.mark.slow)])
def test_retrieval_takes_bounded_memory_intervals_included(count, megabytes):
    # All similarities at once, and which are right, would be 1,280 MB of 16,000 and 12,500 MB of 50,000.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(count)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < megabytes * 1024
