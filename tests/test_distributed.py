"""Two processes do what one does: losses, gradients, checkpoints, sharded weights; launched once for all tests."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from helpers.warm_python import run_in_processes
from torch import Tensor

import koclip
from koclip import distributed, training
from koclip.config import ConfigError, TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """Return what two gloo processes found."""
    run_in_processes([two_processes.__file__, str(folder)], 2)
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    assert results["world_size"] == 2
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Return what this process finds alone, with the same global batch."""
    assert distributed.world_size() == 1
    return two_processes.losses_and_gradients(training.start(two_processes.TRAIN))


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bar: the loss to 1e-6, every gradient to 1e-5."""
    assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    assert got["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        difference = (got["gradients"][name].reshape(gradient.shape) - gradient).abs().max().item()
        assert difference <= 1e-5, (name, difference)


@pytest.mark.parametrize("name", two_processes.LOSSES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(
    name: str, alone: dict[str, Any], two: dict[str, Any]
) -> None:
    assert_same(two["ddp"][name], alone[name])
    scalars = ["model.logit_scale", *(["logit_bias"] if name.startswith("sigmoid") else [])]
    for scalar in scalars:
        assert two["ddp"][name]["gradients"][scalar].abs() > 1e-4


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_grad_cache_in_two_processes_equals_the_plain_way(name: str, two: dict[str, Any]) -> None:
    results = two["grad_cache"][name]
    assert results["loss"][1] == pytest.approx(results["loss"][0], abs=1e-6)
    plain, cached = results["gradients"]
    largest = max(alone.norm() for alone in plain.values())
    for key, gradient in plain.items():
        if gradient.norm() > 1e-6 * largest:  # but a key's bias: zero but for rounding
            both = gradient.flatten().double(), cached[key].flatten().double()
            assert torch.nn.functional.cosine_similarity(*both, dim=0) >= 0.99999, key
            assert abs(both[1].norm() / both[0].norm() - 1) <= 1e-4, key
    assert results["syncs"] == [0, 20]  # once a step, whatever the number of pieces; the plain way averages by itself
    plain, cached = results["weights"]
    assert max((cached[key] - alone).abs().max().item() for key, alone in plain.items()) <= 1e-5


def test_a_batch_that_is_not_finite_on_one_process_is_skipped_on_all(two: dict[str, Any]) -> None:
    first, second = two["bad"]["events"]
    assert [(event.step, event.kind) for event in first] == [(2, "bad_step")]
    assert first[0].keys == second[0].keys == ["2/0/0", "2/0/1", "3/0/0", "3/0/1"]
    weights = two["bad"]["weights"].view(2, -1)
    assert weights.isfinite().all()
    assert torch.equal(weights[0], weights[1])


def test_gather_returns_rows_in_rank_order_and_sums_gradients(two: dict[str, Any]) -> None:
    results = two["collectives"]
    assert torch.equal(results["gathered"], torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2))
    weights = torch.arange(1.0, 13.0).view(4, 3)
    assert torch.equal(torch.cat(results["gradient"]), 2 * weights)  # from both processes


def test_means_and_flags_are_global(two: dict[str, Any]) -> None:
    results = two["collectives"]
    assert results["mean"] == {"a": 0.5, "b": 2.0}
    assert results["any"] == [True, False]
    assert results["objects"] == ["process 0", "process 1"]


def test_resuming_in_two_processes_changes_nothing(two: dict[str, Any]) -> None:
    results = two["resumed"]
    assert results["step"] == 1
    assert all(torch.equal(value, results["resumed"][name]) for name, value in results["straight"].items())


def test_sharded_weights_have_the_gradients_of_one_process(alone: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two["fsdp2"], alone["sigmoid/positives/dense"])


def test_sharded_weights_train_in_pieces_too(two: dict[str, Any]) -> None:
    whole, pieces = two["fsdp2"]["in_pieces"]["at once"], two["fsdp2"]["in_pieces"]["pieces"]
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert all(math.isfinite(stats["grad_norm"]) and stats["bad_steps"] == 0 for stats in two["fsdp2"]["stats"])


def test_sharded_logit_scale_is_clamped(two: dict[str, Any]) -> None:
    assert two["fsdp2"]["scale"] == pytest.approx(100)


def test_sharded_weights_evaluate_resume_and_publish(folder: Path, two: dict[str, Any]) -> None:
    encoder = koclip.load(folder / "fsdp2" / "published" / "model", device="cpu")
    model = encoder.model
    assert model.logit_scale.shape == ()
    texts: Tensor = encoder.encode_texts(["빨간 원", "파란 별"])
    for embeddings in two["fsdp2"]["texts"]:
        torch.testing.assert_close(embeddings, texts, atol=1e-6, rtol=0)


def test_another_number_of_processes_than_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.num_processes: got 1 .*expected 2"):
        training.start(TrainConfig(num_processes=2, tracker="none"))


def test_alone_the_collectives_are_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert distributed.gather(rows) is rows
    assert distributed.mean({"a": 1.5}, torch.device("cpu")) == {"a": 1.5}
    assert distributed.any_process(True, torch.device("cpu"))
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()
