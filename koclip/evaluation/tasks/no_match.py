"""Queries without their image: how many show something, and how many of the other queries still show their image.

A caption is searched among the images of the others, where it has no match. Half of the images calibrate a threshold
(`koclip.classifiers.conformal`) by the best scores of their captions; the other half tests it. `shown@5` is the share
of captions that show something although their image was removed: at most 5 percent is promised. `kept@5` is the share
of captions that show their image when it is there. Both halves take both roles, in 20 random splits. Each image weighs
the same. `threshold@5` is what all images calibrate; its interval is the range of what the halves calibrate.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from koclip.classifiers.conformal import ALPHAS, highest_without_match, smallest_count
from koclip.config import check
from koclip.evaluation.embed import Embedder, UniqueCaptions, collect
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric, mean

SPLITS = 20
_CHUNK = 1_024  # captions scored at a time
_FEWEST = 2 * smallest_count(min(ALPHAS))  # images: each half must be able to promise the smallest alpha


class Scores(NamedTuple):
    """The scores of C captions, and the image of each."""

    others: torch.Tensor  # (C,) the best score among the images that do not have this caption
    own: torch.Tensor  # (C,) the best score among those that have it
    images: torch.Tensor  # (C,) int64, the first of those


def scores_of(captions: UniqueCaptions, images: torch.Tensor, texts: torch.Tensor) -> Scores:
    """Return the scores of the captions. `images` (I, D) and `texts` (C, D) are their embeddings."""
    others, own = torch.empty(len(texts)), torch.empty(len(texts))
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarity = texts[part] @ images.T  # (c, I)
        owned = torch.zeros_like(similarity, dtype=torch.bool)
        for row, places in enumerate(captions.images[part]):
            owned[row, places] = True
        others[part] = similarity.masked_fill(owned, float("-inf")).amax(dim=1)
        own[part] = similarity.masked_fill(~owned, float("-inf")).amax(dim=1)
    return Scores(others, own, torch.tensor([places[0] for places in captions.images]))


class Half(NamedTuple):
    """A threshold, and the captions (C,) that it is tested on."""

    threshold: float
    tested: torch.Tensor


def halves(scores: Scores, alpha: float, num_splits: int, seed: int) -> Iterator[Half]:
    """Yield two halves for each random split of the images: one half calibrates, the other is tested.

    Raises:
        ConfigError: half of the images is too few for `alpha`.
    """
    random = np.random.default_rng(seed)
    present, places = scores.images.unique(return_inverse=True)
    for _ in range(num_splits):
        first = torch.zeros(len(present), dtype=torch.bool)
        first[random.permutation(len(present))[: len(present) // 2]] = True
        for tested in (first[places], ~first[places]):
            threshold = highest_without_match(scores.others[~tested], alpha, scores.images[~tested])
            yield Half(threshold, tested)


def no_match(scores: Scores, seed: int) -> dict[str, Metric]:
    """Return `shown`, `kept` and `threshold` for 5, 10 and 20 percent. Intervals of shares resample images."""
    metrics = dict[str, Metric]()
    for alpha in ALPHAS:
        shown, kept, thresholds = torch.zeros(len(scores.own)), torch.zeros(len(scores.own)), list[float]()
        for threshold, tested in halves(scores, alpha, SPLITS, seed):
            shown += tested & (scores.others > threshold)
            kept += tested & (scores.own > threshold)
            thresholds.append(threshold)
        low, high = np.quantile(thresholds, [0.025, 0.975]).tolist()
        whole = highest_without_match(scores.others, alpha, scores.images)
        percent = round(100 * alpha)
        metrics[f"no_match/shown@{percent}"] = mean(per_image(shown / SPLITS, scores.images))
        metrics[f"no_match/kept@{percent}"] = mean(per_image(kept / SPLITS, scores.images))
        metrics[f"no_match/threshold@{percent}"] = Metric(whole, (low, high), len(scores.images.unique()))
    return metrics


def per_image(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values (C,) of each image's captions, one for each image that has any."""
    places = images.unique(return_inverse=True)[1]
    means: torch.Tensor = places.bincount(values.double()) / places.bincount()
    return means


def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
    """Measure the captions of a language."""
    captioned = eval_set.captioned
    captions = collect(captioned.texts(language), [])
    _check_count(eval_set.name, language, len({images[0] for images in captions.images}))
    scores = scores_of(captions, embedder.images(captioned.images), embedder.texts(captions.texts))
    return no_match(scores, eval_set.config.seed)


def _check(eval_set: EvalSet) -> None:
    captioned = eval_set.captioned
    for language in captioned.languages:
        _check_count(eval_set.name, language, sum(bool(own) for own in captioned.texts(language)))


def _check_count(name: str, language: str, count: int) -> None:
    fix = f"the task no_match expects {_FEWEST} or more, so that half of them can promise {min(ALPHAS):.0%}"
    check(count >= _FEWEST, f"eval.sets[]: {name}, images with different captions in {language}", count, fix)


_GROUP = "Queries without a match"
TASK = Task(
    "no_match",
    run,
    lambda eval_set: eval_set.captioned.languages,
    (
        Spec("no_match/shown@{alpha:d}", "show something, {alpha} % promised", group=_GROUP, card=_GROUP),
        Spec("no_match/kept@{alpha:d}", "with a match, still show it, {alpha} %", group=_GROUP, card=_GROUP),
        Spec("no_match/threshold@{alpha:d}", "threshold for {alpha} %", "number", _GROUP, card=_GROUP),
    ),
    _check,
)
