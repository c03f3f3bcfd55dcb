"""Accuracy of zero-shot classification, with 95 % intervals: `koclip.metrics` for the `evaluate` library."""

import datasets
import evaluate
import torch

from koclip.evaluation.modules import flat, matrix, positives
from koclip.metrics import first_ranks, mean_per_class, share

_DESCRIPTION = """
Accuracy is the share of images whose class has the highest score; accuracy@5: one of the five highest scores. A wrong
class with the same score as the right class counts as higher. mean_per_class is the mean of the classes' accuracies
(also called balanced accuracy). 95 % intervals: Wilson's; bootstrap for the mean per class.
"""
_INPUTS = """
Args:
    predictions: scores of all classes for each image, such as similarities with the classes' prompts.
    references: index of each image's class.
Returns:
    accuracy, accuracy@5 and mean_per_class (0 to 1) with their intervals, <name>_ci95: [low, high]; n: the images.
"""


class ZeroShotAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, accuracy@5 and the mean over the classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float | int | list[float]]:
        scores = matrix(predictions, "class")
        ranks = first_ranks(scores, positives([[label] for label in references], scores.shape[1], "class"))
        return flat(
            {
                "accuracy": share(ranks < 1),
                "accuracy@5": share(ranks < 5),
                "mean_per_class": mean_per_class(ranks < 1, torch.tensor(references)),
            }
        )
