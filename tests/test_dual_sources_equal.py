"""Sources of every class: a resumed run has the bits of an uninterrupted run, and two processes train as one does."""

import itertools
import json
from pathlib import Path
from typing import Any

import dual_sources
import pytest
import torch
from align_runs import align, arguments
from dual_sources import FULL, SOURCES, loss_of, named, write_sources
from helpers.warm_python import run_in_processes
from safetensors.torch import load_file

from koclip.training import loop

STOPPED_BEFORE = 4  # steps; the checkpoint is from the third, in the second stage


class PowerCutError(Exception):
    """What stops a run in the middle."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def few(*quick: str) -> list[Any]:
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in SOURCES]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", few("open_clip SigLIP"))
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, place: Path, tmp_path: Path) -> None:
    common = (*FULL, *loss_of(kind), "--train.save_every", "3")

    def run(name: str, *more: str) -> Path:
        rest = ("--output_dir", str(tmp_path / name), *more)
        align(*arguments(named(place, kind), place / "pairs.parquet", *common, *rest))
        return tmp_path / name

    whole = run("whole")
    calls, step = itertools.count(), loop._step

    def cut(*args: Any, **options: Any) -> Any:
        if next(calls) == STOPPED_BEFORE:
            raise PowerCutError
        return step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", cut)
        with pytest.raises(PowerCutError):
            run("stopped")
    resumed = run("stopped", "--resume", "auto")
    before, after = weights(whole), weights(resumed)
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


@pytest.fixture(scope="module")
def launches(place: Path) -> Path:
    """Return where the runs of one process and of two are."""
    for count in (1, 2):
        run_in_processes([dual_sources.__file__, str(place)], count)
    return place / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_two_processes_train_the_weights_of_one(kind: str, launches: Path) -> None:
    """To 2e-5: sums are rounded in another order, and AdamW divides by the sizes of gradients.

    The bias of a key has no gradient but rounding: a softmax is the same if all its inputs grow.
    """
    alone, two = (weights(launches / f"{kind}-{count}") for count in (1, 2))
    assert alone.keys() == two.keys()
    compared = {name: value for name, value in alone.items() if not name.endswith(("k_proj.bias", "key.bias"))}
    differences = {name: (two[name] - value).abs().max().item() for name, value in compared.items()}
    assert max(differences.values()) <= 2e-5, max(differences, key=lambda name: differences[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_two_processes_log_the_losses_of_one(kind: str, launches: Path) -> None:
    alone, two = (
        [json.loads(line)["loss"] for line in (launches / f"{kind}-{count}" / "metrics.jsonl").read_text().splitlines()]
        for count in (1, 2)
    )
    assert len(alone) == 6
    assert two == pytest.approx(alone, rel=1e-6, abs=0)
