"""Recall@k and the median rank of retrieval, with 95 % intervals: `koclip.metrics` for the `evaluate` library."""

from collections.abc import Sequence

import datasets
import evaluate
import torch

from koclip.evaluation.modules import flat, matrix, positives
from koclip.metrics import KS, first_ranks, recall_at

_DESCRIPTION = """
Recall@k is the share of queries with at least one right entry among the k most similar entries. A wrong entry that is
as similar as the best right entry counts as more similar. The median rank counts from 1. 95 % intervals: bootstrap.
"""
_INPUTS = """
Args:
    predictions: similarities of each query with all entries of the gallery.
    references: indices of the right entries of each query, at least one.
    groups: group of each query, such as the image of a caption (configuration "grouped" only). Intervals resample
        whole groups.
    ks: the ks (of compute() only), default [1, 5, 10].
Returns:
    recall@k (0 to 1) and median_rank with their intervals, <name>_ci95: [low, high]; n: the number of queries.
"""


class RetrievalRecall(evaluate.Metric):  # type: ignore[misc]
    """Recall@k. Configurations: `default`, and `grouped`, which also reads `groups`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "grouped"):
            raise ValueError(f"retrieval_recall: got configuration {self.config_name!r}; expected default or grouped")
        features = {
            "predictions": datasets.List(datasets.Value("float64")),
            "references": datasets.List(datasets.Value("int64")),
        }
        if self.config_name == "grouped":
            features["groups"] = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[int]],
        groups: list[int] | None = None,
        ks: Sequence[int] = KS,
    ) -> dict[str, float | int | list[float]]:
        if not ks or min(ks) < 1:
            raise ValueError(f"ks: got {list(ks)}; expected numbers from 1")
        similarity = matrix(predictions, "entry of the gallery")
        ranks = first_ranks(similarity, positives(references, similarity.shape[1], "entry of the gallery"))
        return flat(recall_at(ranks, None if groups is None else torch.tensor(groups), ks))
