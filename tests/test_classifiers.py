"""Classifiers on embeddings: worked by hand, at their limits, and against the authors' own way."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression

from koclip.classifiers import selection
from koclip.classifiers.heads import Shots, cache_logits, linear, tip_adapter, tip_adapter_f, zero_shot
from koclip.config import ConfigError

# Two classes with three images each, all of norm 1, and their class texts times a scale of 2.
TEXTS = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
IMAGES = [[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8], [0.8, -0.6]]
SHOTS = Shots(torch.tensor(IMAGES), torch.tensor([0, 0, 0, 1, 1, 1]))


def random_shots(count: int = 40, noise: float = 0.4, seed: int = 0) -> tuple[torch.Tensor, Shots]:
    generator = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(4, 8, generator=generator), dim=1)
    labels = torch.arange(count) % 4
    images = F.normalize(texts[labels] + noise * torch.randn(count, 8, generator=generator), dim=1)
    return 10 * texts, Shots(images, labels)


def test_tip_adapter_by_hand():
    """With beta = log 2, a key at cosine a counts 2^(a - 1)."""
    query = torch.tensor([[1.0, 0.0]])
    first = 1 + 2**-0.4 + 2**-0.2  # cosines 1, 0.6, 0.8
    second = 2**-1 + 2**-1.6 + 2**-0.2  # cosines 0, -0.6, 0.8
    logits = tip_adapter(TEXTS, SHOTS, alpha=3.0, beta=math.log(2)).logits(query)
    torch.testing.assert_close(logits, torch.tensor([[2 + 3 * first, 3 * second]]))


def test_linear_by_hand():
    """Images at 1 and -1, texts at 0: the weights w and -w solve w / v = 6 / (1 + exp(2 w)), the slope of the loss."""
    shots = Shots(torch.tensor([[1.0]] * 3 + [[-1.0]] * 3), SHOTS.labels)
    head = linear(torch.zeros(2, 1), shots, variance=0.5)
    weight = brentq(lambda w: w / 0.5 - 6 / (1 + math.exp(2 * w)), 0, 10)
    torch.testing.assert_close(head.weight, torch.tensor([[weight], [-weight]]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.bias, torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "head",
    [
        tip_adapter(TEXTS, SHOTS, 0.0, 5.0),
        tip_adapter_f(TEXTS, SHOTS, 0.0, 5.0),
        linear(TEXTS, SHOTS, 0.0),
        linear(TEXTS, SHOTS, 1e-9),
    ],
)
def test_without_weight_on_the_images_it_is_zero_shot(head):
    torch.testing.assert_close(head.logits(SHOTS.images), zero_shot(TEXTS).logits(SHOTS.images), atol=1e-5, rtol=0)
    torch.testing.assert_close(zero_shot(TEXTS).logits(SHOTS.images), SHOTS.images @ TEXTS.T)


def test_without_texts_it_is_the_cache_alone():
    head = tip_adapter(torch.zeros_like(TEXTS), SHOTS, 1.0, 5.0)
    assert torch.equal(head.logits(SHOTS.images), cache_logits(SHOTS.images, SHOTS, 2, 5.0))
    counted = tip_adapter(torch.zeros_like(TEXTS), SHOTS, 1.0, 0.0)  # beta 0: every key counts the same
    torch.testing.assert_close(counted.logits(SHOTS.images), torch.full((6, 2), 3.0))


def test_linear_without_texts_is_scikit_learns():
    texts, shots = random_shots()
    head = linear(torch.zeros_like(texts), shots, variance=2.0)
    centred = shots.images - shots.images.mean(dim=0)
    peer = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(centred, shots.labels)
    torch.testing.assert_close(head.weight.double(), torch.tensor(peer.coef_), atol=2e-3, rtol=1e-3)


def test_tip_adapter_f_is_the_authors():
    """Their code: a linear layer whose weights start as the keys, and labels as a matrix of 0 and 1."""
    texts, shots = random_shots()
    alpha, beta = 2.0, 3.0
    adapter = torch.nn.Linear(8, 40, bias=False)
    adapter.weight = torch.nn.Parameter(shots.images.clone())
    values = F.one_hot(shots.labels).float()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.001, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        affinity = adapter(shots.images)
        logits = shots.images @ texts.T + ((-1) * (beta - beta * affinity)).exp() @ values * alpha
        loss = F.cross_entropy(logits, shots.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    head = tip_adapter_f(texts, shots, alpha, beta)
    assert head.cache is not None
    torch.testing.assert_close(head.cache.images, adapter.weight.detach())
    assert not torch.equal(head.cache.images, shots.images)


def test_every_method_learns_from_images():
    texts, images = random_shots(120, noise=0.2)
    wrong, shots, test = texts.roll(1, dims=0), images.of(torch.arange(40)), images.of(torch.arange(40, 120))
    for name in ("linear", "tip_adapter", "tip_adapter_f"):
        fitted = selection.fit(selection.method(name), wrong, shots)
        assert (fitted.head.logits(test.images).argmax(1) == test.labels).float().mean() > 0.7, name
        assert fitted.settings != selection.method(name).settings[0]


def test_when_the_names_tell_all_zero_shot_is_kept():
    texts, shots = random_shots()
    perfect = Shots(F.normalize(texts[shots.labels], dim=1), shots.labels)
    zero = selection.fit(selection.method("zero_shot"), texts, perfect)
    fits = [selection.fit(selection.method(name), texts, perfect) for name in ("linear", "tip_adapter")]
    assert all(fitted.held_out is not None and fitted.held_out.hits.all() for fitted in fits)
    assert selection.choose([zero, *fits]).method == "zero_shot"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_method_is_never_below_zero_shot_where_it_is_chosen(seed):
    texts, shots = random_shots(16, noise=1.0, seed=seed)
    fitted = selection.fit(selection.method("tip_adapter"), texts, shots, seed=seed)
    assert fitted.held_out is not None
    assert fitted.held_out.rows is not None
    own = shots.of(fitted.held_out.rows)
    right = zero_shot(texts).logits(own.images).argmax(1) == own.labels
    assert fitted.held_out.hits.sum() >= right.sum()


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(1, 5))
def test_folds_hold_every_image_once_and_leave_every_class_an_image(counts, most):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    folds = selection._folds(labels, most + 1, seed=3)
    held = torch.cat(folds).tolist() if folds else []
    several = [place for place, label in enumerate(labels.tolist()) if counts[label] > 1]
    assert sorted(held) == several
    for fold in folds:
        others = torch.ones(len(labels), dtype=torch.bool)
        others[fold] = False
        assert set(labels[others].tolist()) == set(labels.tolist())


def test_cross_validation_fits_on_no_image_that_it_holds():
    texts, shots = random_shots(24)
    fitted_on = []
    plain = selection.method("linear")

    def fit(texts, shots, settings):
        fitted_on.append({tuple(image) for image in shots.images.tolist()})
        return plain.fit(texts, shots, settings)

    spied = selection.Method("linear", plain.settings, plain.rule, fit)
    result = selection.fit(spied, texts, shots)
    assert result.held_out is not None
    assert result.held_out.rows is not None
    assert [len(images) for images in fitted_on] == [16, 16, 20, 20, 24]  # 4 folds of 6 images per class, then all
    start = 0
    for images in fitted_on[:-1]:
        rows = result.held_out.rows[start : start + 24 - len(images)]
        assert not images & {tuple(image) for image in shots.images[rows].tolist()}
        start += len(rows)


def test_validation_images_decide_if_there_are_some():
    texts, shots = random_shots(24)
    validation = random_shots(60, seed=0)[1].of(torch.arange(24, 60))
    fitted = selection.fit(selection.method("linear"), texts, shots, validation)
    losses = [
        F.cross_entropy(linear(texts, shots, each["variance"]).logits(validation.images), validation.labels).item()
        for each in selection.method("linear").settings
    ]
    assert fitted.chosen_by == "validation"
    assert fitted.settings == selection.method("linear").settings[losses.index(min(losses))]


def test_fewer_right_answers_than_zero_shot_are_never_chosen():
    labels = torch.tensor([0, 0, 1])
    right = torch.tensor([[1.0, 0.9], [1.0, 0.9], [0.9, 1.0]])
    confident = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.1, 0.0]])  # a lower cross-entropy, and a wrong answer
    assert F.cross_entropy(confident, labels) < F.cross_entropy(right, labels)
    names = {"zero_shot": right, "linear": confident, "coop": right}
    fits = [
        selection.Fitted(name, zero_shot(TEXTS), {}, "validation", selection.HeldOut(logits, labels))
        for name, logits in names.items()
    ]
    assert selection.choose(fits).method == "zero_shot"


def test_with_one_image_per_class_the_rule_decides():
    texts, shots = random_shots(4)
    for name in ("linear", "tip_adapter", "tip_adapter_f"):
        fitted = selection.fit(selection.method(name), texts, shots)
        assert (fitted.chosen_by, fitted.held_out) == ("rule", None)
        assert fitted.settings == selection.method(name).rule


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="methods: got 'tip'"):
        selection.method("tip")
