"""Two processes align as one does, by every method: the same bytes of features, the same weights but for rounding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import two_alignments
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., None]) -> Path:
    """Return where the runs of one process and of two are."""
    folder = tmp_path_factory.mktemp("alignments")
    two_alignments.write(folder)
    for count in (1, 2):
        torchrun(two_alignments.__file__, str(folder), count=count)
    return folder


@pytest.mark.parametrize("name", two_alignments.METHODS)
def test_two_processes_train_the_weights_of_one(name: str, folder: Path) -> None:
    """To 5e-6, where six steps move weights by 5e-3: sums are rounded in another order, and AdamW divides by sizes."""
    one, two = (load_file(folder / f"{name}-{count}" / "model" / "model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    differences = {key: (two[key] - value).abs().max().item() for key, value in one.items()}
    assert max(differences.values()) <= 5e-6, max(differences, key=lambda key: differences[key])


@pytest.mark.parametrize("name", two_alignments.METHODS)
def test_two_processes_log_the_losses_of_one(name: str, folder: Path) -> None:
    one, two = (
        [json.loads(line) for line in (folder / f"{name}-{count}" / "metrics.jsonl").read_text().splitlines()]
        for count in (1, 2)
    )
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 7))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-6, abs=0)


def test_two_processes_make_the_features_of_one(folder: Path) -> None:
    """Byte for byte, images and sentences: each process makes whole shards, of the same pieces as one process."""
    made = {}
    for count in (1, 2):
        kept = folder / f"anchored-{count}" / "features"
        made[count] = {str(path.relative_to(kept)): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert made[1] == made[2]
    assert sorted(name.split("/")[0] for name in made[1]) == ["images"] * 4 + ["teacher"] * 4
