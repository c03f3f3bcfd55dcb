"""The linear probe is scikit-learn's on the same features and split, and its search visits the paper's grid."""

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from fake_encoder import ColourEncoder, write_colours
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from koclip.config import ConfigError, SourceConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.evaluation.tasks import probe
from koclip.evaluation.tasks.probe import Part, draw_shots, few_shot, fit, linear_probe, search_c

GRID = np.logspace(-6, 6, 97)  # the paper's 96 steps


def part(count: int, seed: int, classes: int = 4) -> Part:
    """Return overlapping clusters."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, 6))
    return Part((centres[labels] + 1.5 * rng.normal(size=(count, 6))).astype(np.float32), labels)


def test_a_fit_is_scikit_learns_to_1e_9() -> None:
    train, test = part(200, 1), part(100, 2)
    mine = fit(train, c=0.316)
    reference = LogisticRegression(C=0.316, max_iter=1000, solver="lbfgs").fit(train.features, train.labels)
    np.testing.assert_allclose(
        mine.predict_proba(test.features), reference.predict_proba(test.features), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("peak", [-6, -5.125, -1, 0.375, 2, 5.875, 6])
def test_the_search_visits_the_papers_grid_and_finds_a_single_peak(peak: float) -> None:
    def scores_of(cs: list[float]) -> list[float]:
        return [-abs(np.log10(c) - peak) for c in cs]

    best, visited = search_c(scores_of)
    assert best == pytest.approx(10**peak)
    assert visited[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    for c in visited:
        assert np.isclose(c, GRID, rtol=1e-9, atol=0).any(), c
    assert len(visited) <= 7 + 4 * 2
    nearest = sorted(visited, key=lambda c: abs(np.log10(c) - peak))[1]
    assert abs(np.log10(nearest) - peak) == pytest.approx(0.125)  # searched down to the grid's step


def test_of_equal_scores_the_strongest_regularisation_is_taken() -> None:
    assert search_c(lambda cs: [0.5] * len(cs))[0] == 1e-6


def test_the_probe_equals_scikit_learn_by_hand(
    colours: Callable[..., EvalSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search, refit on everything, and test, written out with scikit-learn alone."""
    train, test = part(120, 1), part(80, 2)
    monkeypatch.setattr(probe, "_parts", lambda embedder, eval_set: (train, test))
    eval_set = colours(tasks=["linear_probe"])
    got = linear_probe(Embedder(ColourEncoder(), 8), eval_set)["linear_probe/accuracy"]

    fitted, held = train_test_split(np.arange(120), test_size=0.2, stratify=train.labels, random_state=0)

    def score(exponent: float) -> float:
        model = LogisticRegression(C=10**exponent, max_iter=1000)
        return model.fit(train.features[fitted], train.labels[fitted]).score(train.features[held], train.labels[held])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = {exponent: score(exponent) for exponent in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
        for step in (1.0, 0.5, 0.25, 0.125):
            best = max(scores, key=lambda exponent: (scores[exponent], -exponent))
            scores |= {
                value: score(value) for value in (best - step, best + step) if abs(value) <= 6 and value not in scores
            }
        best = max(scores, key=lambda exponent: (scores[exponent], -exponent))
        refit = LogisticRegression(C=10**best, max_iter=1000).fit(train.features, train.labels)
    assert got.value == pytest.approx(refit.score(test.features, test.labels), abs=1e-9)
    assert 0.3 < got.value < 1.0


def test_features_are_those_before_the_projection(tmp_path, encoded, colours: Callable[..., EvalSet]) -> None:
    class Split(ColourEncoder):
        def _embed_images(self, images):
            raise AssertionError("the probe reads image_features")

    sizes = itertools.count(4)
    file = write_colours(tmp_path / "more.parquet", lambda colour: encoded(colour, size=(next(sizes), 6)), count=80)
    metrics = linear_probe(Embedder(Split(), 8), colours(path=file, tasks=["linear_probe"]))
    assert metrics["linear_probe/accuracy"].value > 0.5
    assert metrics["linear_probe/accuracy"].n == 40  # half of them, no training images being given


def test_training_images_of_their_own(tmp_path, encoded, colours: Callable[..., EvalSet]) -> None:
    larger = write_colours(tmp_path / "larger.parquet", lambda colour: encoded(colour, size=(9, 6)))
    train = SourceConfig(path=str(larger), label="key", captions={})
    metrics = linear_probe(Embedder(ColourEncoder(), 8), colours(tasks=["linear_probe"], train=train))
    assert metrics["linear_probe/accuracy"].n == 24
    assert metrics["linear_probe/accuracy"].value == 1.0


def test_shots_are_drawn_by_class_and_never_twice() -> None:
    labels = np.array([0, 1, 2] * 20)
    fitted, held = draw_shots(labels, shots=5, held=4, seed=3)
    assert np.bincount(labels[fitted]).tolist() == [5, 5, 5]
    assert np.bincount(labels[held]).tolist() == [4, 4, 4]
    assert not set(fitted) & set(held)
    assert set(draw_shots(labels, 5, 4, seed=3)[0]) == set(fitted) != set(draw_shots(labels, 5, 4, seed=4)[0])


def test_few_shots_never_see_the_test_images_to_choose_by(
    colours: Callable[..., EvalSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test images, the same fits: C is chosen on validation alone."""
    train = part(160, 1)
    chosen: dict[int, list[float]] = {}
    for seed in (2, 3):
        monkeypatch.setattr(probe, "_parts", lambda embedder, eval_set, seed=seed: (train, part(40, seed)))
        monkeypatch.setattr(
            probe, "fit", lambda rows, c, seed=seed: chosen.setdefault(seed, []).append(c) or fit(rows, c)
        )
        metrics = few_shot(Embedder(ColourEncoder(), 8), colours(tasks=["few_shot"], shots=[1, 4, 16]))
        assert list(metrics) == [f"few_shot/accuracy_{count:02d}_shots" for count in (1, 4, 16)]
        assert metrics["few_shot/accuracy_16_shots"].value > metrics["few_shot/accuracy_01_shots"].value
    assert chosen[2] == chosen[3]


def test_too_few_images_are_refused(colours: Callable[..., EvalSet]) -> None:
    with pytest.raises(ConfigError, match=r"colours: .*20%.* 12 .* 4 "):
        linear_probe(Embedder(ColourEncoder(), 8), colours(tasks=["linear_probe"]))
    with pytest.raises(ConfigError, match=r"eval\.sets\[\]\.shots: 4 .*colours has 3"):
        few_shot(Embedder(ColourEncoder(), 8), colours(tasks=["few_shot"], shots=[1, 4]))
