"""Calibration: a temperature on held-out logits, and the expected calibration error with its interval.

Guo et al. 2017. Probabilities are `softmax(logits / temperature)`. A temperature changes no answer.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from koclip import installation
from koclip.classifiers.selection import HeldOut

installation.require("eval")
from scipy.optimize import minimize_scalar  # noqa: E402

from koclip.metrics import Metric, calibration_error, mean  # noqa: E402

_RANGE = (0.02, 50.0)  # of the temperature
_FEWEST = 20  # held-out images


class Bin(NamedTuple):
    """A bar of the reliability diagram: the number of images, their mean confidence, and the share of right answers."""

    images: int
    confidence: float
    accuracy: float


def temperature(held_out: HeldOut | None) -> float:
    """Return the temperature with the lowest cross-entropy on held-out images.

    It is 1, the model's own scale, without held-out images, with fewer than 20, or if the 95 % interval of the gain
    (paired, by bootstrap) does not lie above 0.
    """
    if held_out is None or len(held_out.labels) < _FEWEST:
        return 1.0
    logits, labels = held_out.logits.double(), held_out.labels

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(logits / np.exp(exponent), labels))

    bounds = tuple(np.log(_RANGE))
    best = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
    losses = [F.cross_entropy(logits / value, labels, reduction="none") for value in (1.0, best)]
    return best if mean(losses[0] - losses[1]).ci95[0] > 0 else 1.0


def confidences(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the probability of each image's answer (N,) float64."""
    return (logits.double() / temperature).softmax(dim=1).amax(dim=1)


def error(tested: HeldOut, temperature: float = 1.0) -> Metric:
    """Return the expected calibration error, 0 to 1; see `koclip.metrics.calibration_error`."""
    return calibration_error(confidences(tested.logits, temperature), tested.hits)


def bins(tested: HeldOut, temperature: float = 1.0, count: int = 10) -> list[Bin]:
    """Return the bars of the reliability diagram: equal steps of the confidence; empty ones are left out."""
    own = confidences(tested.logits, temperature)
    places = (own * count).long().clamp(max=count - 1)
    bars = []
    for place in range(count):
        inside = places == place
        if inside.any():
            accuracy = float(tested.hits[inside].double().mean())
            bars.append(Bin(int(inside.sum()), float(own[inside].mean()), accuracy))
    return bars
