"""Classifiers on unit-norm image embeddings: zero-shot, Tip-Adapter, and logistic regression from the class texts.

Every method is a pure function from a few labelled embeddings to a `Head`. Letters in shapes: C classes, D embedding
width, N images to classify, M labelled images ("shots").

`texts` (C, D) are the class texts' unit-norm embeddings times the model's logit scale, so that the zero-shot logits of
images (N, D) are `images @ texts.T`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

_ITERATIONS = 200  # of L-BFGS at most; it stops when the gradient is this small:
_TOLERANCE = 1e-6
_EPOCHS, _LR, _EPS = 20, 1e-3, 1e-4  # of Tip-Adapter-F, as in its authors' code


class Shots(NamedTuple):
    """Labelled images: unit-norm embeddings (M, D) and class indices (M,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def of(self, rows: torch.Tensor) -> "Shots":
        """Return these rows; `rows` are indices or a mask."""
        return Shots(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Head:
    """A classifier: a linear layer, and for Tip-Adapter a cache of labelled images besides.

    Args:
        weight: (C, D), in units of logits.
        bias: (C,).
        cache: Keys (M, D) and labels (M,) of the cache; None: a linear classifier.
        alpha: Factor of the cache's logits.
        beta: Sharpness of the cache: a key at cosine a counts exp(-beta (1 - a)).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    cache: Shots | None = None
    alpha: float = 0.0
    beta: float = 0.0

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, C) of unit-norm embeddings (N, D)."""
        logits = images @ self.weight.T + self.bias
        if self.cache is None:
            return logits
        return logits + self.alpha * cache_logits(images, self.cache, len(self.weight), self.beta)


def zero_shot(texts: torch.Tensor) -> Head:
    """Return the classifier by the names alone (Radford et al. 2021)."""
    return Head(texts, texts.new_zeros(len(texts)))


def cache_logits(images: torch.Tensor, cache: Shots, num_classes: int, beta: float) -> torch.Tensor:
    """Return the logits (N, C) of Tip-Adapter's cache: exp(-beta (1 - images @ keys.T)), summed by class."""
    affinity = (-beta * (1 - images @ cache.images.T)).exp()  # (N, M)
    return affinity @ F.one_hot(cache.labels, num_classes).to(affinity)


def tip_adapter(texts: torch.Tensor, shots: Shots, alpha: float, beta: float) -> Head:
    """Return Tip-Adapter (Zhang et al. 2022, equation 4): zero-shot plus alpha times the cache of the shots.

    `alpha` 0 is zero-shot.
    """
    return Head(texts, texts.new_zeros(len(texts)), shots, alpha, beta)


def tip_adapter_f(texts: torch.Tensor, shots: Shots, alpha: float, beta: float) -> Head:
    """Return Tip-Adapter-F (Zhang et al. 2022, section 3.3): Tip-Adapter whose keys are trained, from the shots on.

    AdamW on all shots at once, 20 steps with a cosine schedule; nothing is drawn at random. The keys are not
    normalised again, as in the authors' code.
    """
    keys = torch.nn.Parameter(shots.images.clone())
    optimizer = torch.optim.AdamW([keys], lr=_LR, eps=_EPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    for _ in range(_EPOCHS if alpha else 0):
        head = tip_adapter(texts, Shots(keys, shots.labels), alpha, beta)
        loss = F.cross_entropy(head.logits(shots.images), shots.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tip_adapter(texts, Shots(keys.detach(), shots.labels), alpha, beta)


def linear(texts: torch.Tensor, shots: Shots, variance: float) -> Head:
    """Return logistic regression that starts from the class texts and is pulled towards them.

    The logits are `images @ texts.T + (images - mean) @ change.T` with the mean of the shots. `change` (C, D) minimises
    the sum of the cross-entropies plus ||change||^2 / (2 variance): the most probable weights if each had been drawn
    from a normal distribution around its text. Variance 0 is zero-shot. The text classifier as the start and the
    blending with images: Huang et al. 2024 (LP++); the pull towards it: Li et al. 2018 (L2-SP).
    """
    if not variance:
        return zero_shot(texts)
    mean = shots.images.mean(dim=0)
    centred, fixed = shots.images - mean, shots.images @ texts.T
    change = torch.zeros_like(texts, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change], max_iter=_ITERATIONS, tolerance_grad=_TOLERANCE, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(fixed + centred @ change.T, shots.labels, reduction="sum")
        loss = (loss + change.square().sum() / (2 * variance)) / len(shots.labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = change.detach()
    return Head(texts + learned, -(learned @ mean))
