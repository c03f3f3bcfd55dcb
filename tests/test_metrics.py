import pytest
import torch

from koclip.metrics import first_ranks, recall_at, share

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
    with pytest.raises(ValueError, match="no queries"):
        share(torch.zeros(0).bool())
