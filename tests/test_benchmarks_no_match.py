"""The benchmark of queries without a match, on drawn scores of three models with different ranges."""

import sys
from pathlib import Path

import pytest
import torch

from koclip.evaluation.tasks.no_match import Scores

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))  # as Python does for a script

import no_match


def drawn(mean: float, spread: float, seed: int) -> Scores:
    """Draw the scores of 3 captions for each of 600 images."""
    random = torch.Generator().manual_seed(seed)
    images = torch.arange(600).repeat_interleave(3)
    others = mean + spread * torch.randn(1_800, generator=random)
    return Scores(others, others + 2 * spread, images)


def test_each_model_keeps_its_promise_and_a_flat_cut_off_misses_it():
    models = {"low": drawn(0.2, 0.02, 0), "middle": drawn(0.3, 0.02, 1), "wide": drawn(0.3, 0.05, 2)}
    for alpha in (0.05, 0.1, 0.2):
        rows = no_match.measure(models, "ko", alpha, splits=10)
        assert [row.model for row in rows] == list(models)
        for row in rows:
            assert row.shown == pytest.approx(100 * alpha, abs=1)
            assert row.low <= row.shown <= row.high
            assert row.kept > row.shown
        assert max(abs(row.flat_shown - 100 * alpha) for row in rows) > 4
        assert sum(row.flat_shown for row in rows) / 3 == pytest.approx(100 * alpha, abs=1)
    assert len(no_match.table(rows).splitlines()) == 2 + len(rows)


def test_the_flat_cut_off_of_a_single_model_is_its_own():
    (row,) = no_match.measure({"only": drawn(0.2, 0.02, 0)}, "ko", 0.1, splits=2)
    assert (row.flat_shown, row.flat_kept) == (row.shown, row.kept)


@pytest.mark.parametrize("model", ["runs/mine/model", "runs/mine/model/", "runs/mine", "mine"])
def test_a_model_is_named_by_its_run(model):
    assert no_match.name_of(model) == "mine"
