"""Logistic regression on image features: the CLIP paper's linear probe, and the same on a few images per class.

Radford et al. 2021, appendix A.3: features before the projection, scikit-learn's L-BFGS with at most 1,000 iterations,
and the L2 regularisation that is best on a validation split. The search over C starts at 1e-6, 1e-4 ... 1e6 and halves
its step around the best, down to an eighth of a decade (the grid has 96 steps). The paper's lambda is used as
scikit-learn's C, as in its authors' README (C = 0.316).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from koclip import distributed
from koclip.config import ConfigError
from koclip.evaluation.embed import Embedder
from koclip.evaluation.embed import share as shared
from koclip.evaluation.results import IMAGES, Spec, Task
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric, mean, mean_per_class, share

if TYPE_CHECKING:  # scikit-learn is imported where it is used: the Space imports this file without it
    from sklearn.linear_model import LogisticRegression

_START = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # exponents of C
_STEP = 0.125  # eight per decade
_ITERATIONS = 1_000
_VALIDATION = 0.2  # share of the training images
_TESTED = 0.5  # share of a set without training images
_DRAWS = 3  # random draws of few-shot images, as in CoOp
_MOST_VALIDATION_SHOTS = 4  # images per class, as in CoOp

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Part(NamedTuple):
    """Features (N, W) and labels (N,)."""

    features: Array
    labels: Labels

    def of(self, rows: npt.NDArray[np.int64]) -> "Part":
        """Return these rows."""
        return Part(self.features[rows], self.labels[rows])


def fit(train: Part, c: float) -> "LogisticRegression":
    """Fit the probe with inverse regularisation strength `c`. It stops after 1,000 iterations, converged or not."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # few images per class are intended
        return LogisticRegression(C=c, max_iter=_ITERATIONS).fit(train.features, train.labels)


def search_c(scores_of: Callable[[list[float]], list[float]]) -> tuple[float, list[float]]:
    """Return the C with the best score of `scores_of` (on a list of Cs), the smallest of several, and all tried Cs."""
    scores: dict[float, float] = {}
    exponents, step = list(_START), 1.0
    while True:
        scores |= zip(exponents, scores_of([10**exponent for exponent in exponents]), strict=True)
        best = max(scores, key=lambda exponent: (scores[exponent], -exponent))
        if step < _STEP:
            return 10**best, [10**exponent for exponent in scores]
        near = (best - step, best + step)
        exponents = [exponent for exponent in near if _START[0] <= exponent <= _START[-1] and exponent not in scores]
        step /= 2


def linear_probe(embedder: Embedder, eval_set: EvalSet, _: str = IMAGES) -> dict[str, Metric]:
    """Find C on a fifth of the training images, fit on all of them, and test."""
    train, test = _parts(embedder, eval_set)
    fitted, held = _split(train.labels, _VALIDATION, eval_set)
    c = _best_c(embedder, train.of(fitted), train.of(held), f"{eval_set.name}: linear probe")
    hits = torch.from_numpy(fit(train, c).predict(test.features) == test.labels)
    return {
        "linear_probe/accuracy": share(hits),
        "linear_probe/mean_per_class": mean_per_class(hits, torch.from_numpy(test.labels)),
    }


def few_shot(embedder: Embedder, eval_set: EvalSet, _: str = IMAGES) -> dict[str, Metric]:
    """Fit on a few images per class, with C from as many others (at most four); return the mean of three draws."""
    train, test = _parts(embedder, eval_set)
    metrics = {}
    for shots in eval_set.config.shots:
        held = _held(shots, train.labels, eval_set)
        hits = []
        for draw in range(_DRAWS):
            fitted, validation = draw_shots(train.labels, shots, held, seed=_DRAWS * eval_set.config.seed + draw)
            c = _best_c(embedder, train.of(fitted), train.of(validation), f"{eval_set.name}: {shots} shots")
            hits.append(fit(train.of(fitted), c).predict(test.features) == test.labels)
        metrics[f"few_shot/accuracy_{shots:02d}_shots"] = mean(torch.from_numpy(np.mean(hits, axis=0)))
    return metrics


def check_probes(eval_set: EvalSet) -> None:
    """Check that a set has enough images for its probes.

    Raises:
        ConfigError: it has too few.
    """
    labels = np.array(eval_set.labels if eval_set.train is None else eval_set.train.labels)
    if eval_set.train is None:
        labels = labels[_split_distinct(labels, _TESTED, eval_set)[0]]
    if "linear_probe" in eval_set.config.tasks:
        _split(labels, _VALIDATION, eval_set)
    if "few_shot" in eval_set.config.tasks:
        for shots in eval_set.config.shots:
            _held(shots, labels, eval_set)


def _held(shots: int, labels: Labels, eval_set: EvalSet) -> int:
    """Return the number of validation images per class for a number of shots; raise if a class has too few images."""
    held, smallest = min(shots, _MOST_VALIDATION_SHOTS), int(np.unique(labels, return_counts=True)[1].min())
    if shots + held > smallest:
        raise ConfigError(
            f"eval.sets[].shots: {shots} shots need {shots + held} training images per class, {held} of them for "
            f"validation, but a class of {eval_set.name} has {smallest}: remove this number"
        )
    return held


def draw_shots(labels: Labels, shots: int, held: int, seed: int) -> tuple[Labels, Labels]:
    """Return the indices of `shots` images, and of `held` other images, of every class."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    fitted = np.concatenate([places[:shots] for places in drawn])
    return fitted, np.concatenate([places[shots : shots + held] for places in drawn])


def _best_c(embedder: Embedder, train: Part, held: Part, label: str) -> float:
    with tqdm(desc=label, unit=" fits", leave=False, disable=distributed.rank() > 0) as bar:

        def score(c: float) -> float:
            bar.update()
            return float(fit(train, c).score(held.features, held.labels))

        return search_c(lambda cs: shared(score, cs, embedder.spread))[0]


def _split_distinct(labels: Labels, share: float, eval_set: EvalSet) -> tuple[Labels, Labels]:
    """Split a set's images as `_split` does, but keep equal images in one part: no training image is tested."""
    places: dict[bytes, list[int]] = {}
    for place, digest in enumerate(eval_set.images.digests):
        places.setdefault(digest, []).append(place)
    equal = list(places.values())
    parts = _split(labels[[first for first, *_ in equal]], share, eval_set)
    fitted, aside = (np.array([place for number in part for place in equal[number]]) for part in parts)
    return fitted, aside


def _split(labels: Labels, share: float, eval_set: EvalSet) -> tuple[Labels, Labels]:
    """Return the indices of the images to fit on and of a share to set aside, drawn from each class in proportion."""
    counts = np.unique(labels, return_counts=True)[1]
    if counts.min() < 2 or share * len(labels) < len(counts):
        raise ConfigError(
            f"{eval_set.name}: a probe sets {share:.0%} of its images aside, and {len(labels)} images of {len(counts)} "
            f"classes (the smallest has {counts.min()}) are too few for that; add images in eval.sets[].train"
        )
    from sklearn.model_selection import train_test_split

    places, seed = np.arange(len(labels)), eval_set.config.seed
    fitted, aside = train_test_split(places, test_size=share, stratify=labels, random_state=seed)
    return fitted, aside


def _parts(embedder: Embedder, eval_set: EvalSet) -> tuple[Part, Part]:
    """Return the training and the test images of probes."""
    whole = Part(embedder.features(eval_set.images).numpy(), np.array(eval_set.labels))
    if eval_set.train is not None:
        return Part(embedder.features(eval_set.train.images).numpy(), np.array(eval_set.train.labels)), whole
    fitted, tested = _split_distinct(whole.labels, _TESTED, eval_set)
    return whole.of(fitted), whole.of(tested)


_HUB = "image-classification"
LINEAR_PROBE = Task(
    "linear_probe",
    linear_probe,
    lambda _: [IMAGES],
    (
        Spec(
            "linear_probe/accuracy",
            "linear probe",
            summary="images that a linear probe classifies correctly",
            chart=("shots", "all images"),
            hub_task=_HUB,
            watched=True,
        ),
        Spec("linear_probe/mean_per_class", "linear probe, mean over classes", hub_task=_HUB),
    ),
    check_probes,
)
_SHOTS = "few_shot/accuracy_{shots:d}_shots"
FEW_SHOT = Task(
    "few_shot",
    few_shot,
    lambda _: [IMAGES],
    (Spec(_SHOTS, "probe on {shots} per class", chart=("shots", "few"), hub_task=_HUB),),
    check_probes,
)
