"""Effective robustness: what a model keeps under shift beyond what its accuracy without shift foretells."""

import numpy as np
from scipy.special import expit, logit

from koclip.metrics import Metric

_FEWEST = 3  # other models that a line is drawn through
_EDGE = 0.5  # images; the logit of 0 and 1 is infinite


def effective_robustness(base: Metric, shifted: Metric, others: list[tuple[Metric, Metric]]) -> Metric:
    """Return the accuracy under shift less what the line through the other models says for this one's base accuracy.

    Taori et al. 2020, section 4: the line is fitted on logits of accuracies. The interval is that of the accuracy under
    shift; the line is taken as known.

    Args:
        base: The model's accuracy on the set itself.
        shifted: Its accuracy on the shifted set.
        others: Both of the other models.

    Raises:
        ValueError: there are fewer than three others, or all of them have the same base accuracy.
    """
    points = np.array([[_logit(one), _logit(two)] for one, two in others])
    if len(points) < _FEWEST or np.ptp(points[:, 0]) == 0:
        raise ValueError(f"a line takes at least {_FEWEST} other models of different accuracy, got {len(points)}")
    slope, offset = np.polyfit(points[:, 0], points[:, 1], deg=1)
    foretold = float(expit(slope * _logit(base) + offset))
    low, high = shifted.ci95
    return Metric(shifted.value - foretold, (low - foretold, high - foretold), shifted.n)


def _logit(accuracy: Metric) -> float:
    edge = _EDGE / accuracy.n
    return float(logit(np.clip(accuracy.value, edge, 1 - edge)))


def add_effective_robustness(results: dict[str, dict[str, Metric]]) -> None:
    """Add `effective_robustness` to every shift of every model's metrics, where the other models allow a line."""
    for model, metrics in results.items():
        for name, shifted in list(metrics.items()):
            place, _, task = name.removesuffix("/accuracy").rpartition("/")
            if not (name.endswith("/accuracy") and task.startswith("shift_") and task != "shift_none"):
                continue
            base = f"{place}/shift_none/accuracy"
            others = [(one[base], one[name]) for key, one in results.items() if key != model]
            if len(others) >= _FEWEST and len({one.value for one, _ in others}) > 1:
                metrics[f"{place}/{task}/effective_robustness"] = effective_robustness(metrics[base], shifted, others)
