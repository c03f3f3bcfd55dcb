"""Queries whose image was removed: scores by hand, coverage on drawn embeddings, and sets that are too small."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_encoder import ColourEncoder

from koclip.classifiers.conformal import ALPHAS, highest_without_match
from koclip.config import ConfigError, EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder, collect
from koclip.evaluation.results import records_of
from koclip.evaluation.run import evaluate
from koclip.evaluation.tasks import SPECS, no_match
from koclip.evaluation.tasks.no_match import SPLITS, Scores, halves, per_image, scores_of


def test_scores_by_hand():
    captions = collect([["가"], ["나", "다"], ["가"]], [])  # 가 has two images
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])  # 가, 나, 다
    scores = scores_of(captions, images, texts)
    assert scores.others.tolist() == pytest.approx([0.0, 0.8, 0.96])
    assert scores.own.tolist() == pytest.approx([1.0, 1.0, 0.6])
    assert scores.images.tolist() == [0, 1, 1]


def test_scores_do_not_depend_on_the_chunks(monkeypatch):
    random = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 8, generator=random), dim=1) for count in (30, 60))
    captions = collect([[f"{place}", f"{place} 나"] for place in range(30)], [])
    whole = scores_of(captions, images, texts)
    monkeypatch.setattr(no_match, "_CHUNK", 7)
    for first, second in zip(whole, scores_of(captions, images, texts), strict=True):
        assert torch.allclose(first.double(), second.double(), atol=1e-6)


def drawn(count: int, per: int, seed: int = 0) -> Scores:
    """Draw scores of captions that resemble those of their image, `per` for each of `count` images."""
    random = torch.Generator().manual_seed(seed)
    images = torch.arange(count).repeat_interleave(per)
    others = torch.randn(count, generator=random)[images] + 0.5 * torch.randn(count * per, generator=random)
    return Scores(others, others + 1, images)


def test_both_halves_test_each_image_once_in_a_split():
    scores = drawn(41, 3)
    for first, second in zip(*[halves(scores, 0.2, 4, seed=1)] * 2, strict=True):
        assert bool((first.tested ^ second.tested).all())
        assert {tuple(part) for part in first.tested.view(41, 3).tolist()} == {(False,) * 3, (True,) * 3}
        assert first.threshold == highest_without_match(scores.others[second.tested], 0.2, scores.images[second.tested])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("per", [1, 5])
def test_the_share_that_shows_something_is_the_promised_share(alpha, per):
    scores = drawn(600, per)
    shares = [
        float(per_image((scores.others > threshold).float(), scores.images)[scores.images[tested].unique()].mean())
        for threshold, tested in halves(scores, alpha, 60, seed=2)
    ]
    assert np.mean(shares) == pytest.approx(alpha, abs=0.01)


def test_numbers_of_the_task():
    scores = drawn(100, 2)
    metrics = no_match.no_match(scores, seed=0)
    assert len(metrics) == 3 * len(ALPHAS)
    for alpha in ALPHAS:
        shown, kept, threshold = (
            metrics[f"no_match/{name}@{100 * alpha:.0f}"] for name in ("shown", "kept", "threshold")
        )
        assert shown.n == kept.n == threshold.n == 100
        expected = np.mean(
            [[float((part[tested] > limit).double().mean()) for limit, tested in halves(scores, alpha, SPLITS, seed=0)]
             for part in (scores.others, scores.own)],
            axis=1,
        )  # fmt: skip
        assert [shown.value, kept.value] == pytest.approx(expected.tolist())
        assert shown.value < kept.value
        assert threshold.value == highest_without_match(scores.others, alpha, scores.images)
        assert threshold.ci95[0] <= threshold.value <= threshold.ci95[1]
    assert metrics == no_match.no_match(scores, seed=0)
    assert metrics != no_match.no_match(scores, seed=1)


def test_images_weigh_the_same():
    assert per_image(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([7, 7, 7, 3])).tolist() == [
        1.0,
        pytest.approx(1 / 3),
    ]


def test_the_task_runs_by_its_name(colours, monkeypatch):
    monkeypatch.setattr(no_match, "ALPHAS", (0.1, 0.2))
    monkeypatch.setattr(no_match, "_FEWEST", 18)
    eval_set = colours(None, {"ko": "ko", "en": "en"}, tasks=["no_match"])
    metrics = evaluate(Embedder(ColourEncoder(), 8), [eval_set])
    records = records_of(metrics, SPECS)
    assert {record.language for record in records} == {"ko", "en"}
    assert {record.spec.pattern for record in records} == {spec.pattern for spec in no_match.TASK.specs}
    assert {record.params["alpha"] for record in records} == {10, 20}


def test_a_set_that_is_too_small_is_refused_before_a_model_is_needed(colours):
    eval_set = colours(None, {"ko": "ko", "en": "en"}, tasks=["no_match"])  # 24 images
    assert no_match.TASK.check
    with pytest.raises(ConfigError, match=r"ko.*24.*38"):
        no_match.TASK.check(eval_set)
    with pytest.raises(ConfigError, match="no_match"):
        EvalSetConfig(source=SourceConfig(captions={}, label="key"), tasks=["no_match"])
