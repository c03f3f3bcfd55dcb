"""Effective robustness: what is above the line that other models draw."""

import pytest
from scipy.special import expit, logit

from koclip.evaluation.tasks.zero_shot import add_effective_robustness, effective_robustness
from koclip.metrics import Metric


def accuracy(value: float) -> Metric:
    return Metric(value, (value - 0.02, value + 0.02), 1_000)


def on_the_line(base: float) -> tuple[Metric, Metric]:
    """A model of the line logit(shifted) = 0.8 logit(base) - 1."""
    return accuracy(base), accuracy(float(expit(0.8 * logit(base) - 1)))


def test_a_model_on_the_line_has_none() -> None:
    others = [on_the_line(base) for base in (0.2, 0.4, 0.6)]
    robustness = effective_robustness(*on_the_line(0.5), others)
    assert robustness.value == pytest.approx(0, abs=1e-12)
    assert robustness.ci95 == pytest.approx((-0.02, 0.02))


def test_what_is_above_the_line_is_robustness() -> None:
    others = [on_the_line(base) for base in (0.2, 0.4, 0.6)]
    base, shifted = on_the_line(0.5)
    assert effective_robustness(base, accuracy(shifted.value + 0.1), others).value == pytest.approx(0.1)


def test_accuracies_of_0_and_1_have_a_logit() -> None:
    others = [(accuracy(0.0), accuracy(0.0)), (accuracy(0.5), accuracy(0.4)), (accuracy(1.0), accuracy(1.0))]
    assert abs(effective_robustness(accuracy(0.5), accuracy(0.5), others).value) < 0.2


@pytest.mark.parametrize("count", [0, 2])
def test_a_line_takes_three_others(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        effective_robustness(accuracy(0.5), accuracy(0.5), [on_the_line(0.1 * (1 + number)) for number in range(count)])


def test_it_is_added_where_the_other_models_allow_it() -> None:
    def metrics(base: float) -> dict[str, Metric]:
        before, after = on_the_line(base)
        return {"emoji/ko/shift_none/accuracy": before, "emoji/ko/shift_blob/accuracy": after}

    results = {str(base): metrics(base) for base in (0.2, 0.4, 0.6)}
    add_effective_robustness(results)
    assert all(len(own) == 2 for own in results.values())  # two others draw no line
    results["0.7"] = metrics(0.7)
    add_effective_robustness(results)
    for own in results.values():
        assert own["emoji/ko/shift_blob/effective_robustness"].value == pytest.approx(0, abs=1e-9)
        assert len(own) == 3
