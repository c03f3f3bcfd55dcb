"""Temperatures and calibration errors: worked by hand, and against logits whose right temperature is known."""

import pytest
import torch

from koclip.classifiers import calibration
from koclip.classifiers.selection import HeldOut
from koclip.metrics import calibration_error


def drawn(scale: float, count: int = 4_000) -> HeldOut:
    """Logits whose labels are drawn from their softmax, times a scale: the right temperature is the scale."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return HeldOut(scale * logits, labels)


def test_the_error_by_hand():
    """Bins of 1/15: 0.50 and 0.52 share a bin (0.4667 to 0.5333), 0.9 has its own; gaps 0.5 - 0.51 and 1 - 0.9."""
    error = calibration_error(torch.tensor([0.5, 0.52, 0.9, 0.9]), torch.tensor([True, False, True, True]))
    assert error.value == pytest.approx((2 * 0.01 + 2 * 0.1) / 4)
    assert error.n == 4


def test_confidence_1_is_in_the_last_bin():
    assert calibration_error(torch.tensor([1.0, 0.99]), torch.tensor([True, False])).value == pytest.approx(0.495)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_the_temperature_is_the_scale_of_the_logits(scale):
    held_out = drawn(scale)
    value = calibration.temperature(held_out)
    assert value == pytest.approx(scale, rel=0.1)
    before, after = calibration.error(held_out), calibration.error(held_out, value)
    assert before.value > 0.05  # over- and under-confident logits are both wrong
    assert after.ci95[0] < 0.02 < before.ci95[0]


@pytest.mark.parametrize("held_out", [None, drawn(4.0, count=19), drawn(1.0)], ids=["none", "few", "calibrated"])
def test_the_models_own_scale_is_kept_without_a_shown_gain(held_out):
    assert calibration.temperature(held_out) == 1.0


def test_a_temperature_changes_no_answer():
    held_out = drawn(3.0)
    cooled = HeldOut(held_out.logits / 3.0, held_out.labels)
    assert torch.equal(held_out.hits, cooled.hits)
    torch.testing.assert_close(calibration.confidences(held_out.logits, 3.0), calibration.confidences(cooled.logits))


def test_bars_of_the_diagram_count_every_image():
    held_out = drawn(1.0, count=500)
    bars = calibration.bins(held_out)
    assert sum(bar.images for bar in bars) == 500
    assert sum(bar.images * bar.accuracy for bar in bars) == pytest.approx(float(held_out.hits.sum()))
    for bar in bars:
        assert 0 <= bar.confidence <= 1
    assert [bar.confidence for bar in bars] == sorted(bar.confidence for bar in bars)
