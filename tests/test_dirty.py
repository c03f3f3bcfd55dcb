"""A dirty data set trains, resumes, aligns, is evaluated and indexed; every sample is used or listed."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import dirty
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import two_dirty
from align_runs import write_source
from helpers.warm_python import run_in_processes
from safetensors.torch import load_file
from tiny import tiny_tokenizer

from koclip.config import DataConfig, EvalSetConfig, IndexConfig, SourceConfig
from koclip.data.batches import Assembler
from koclip.data.loader import train_loader
from koclip.data.order import BatchPart
from koclip.data.sources import Row, open_source
from koclip.data.transforms import Views, read
from koclip.encoders import load
from koclip.evaluation.embed import Embedder
from koclip.evaluation.run import counts, evaluate
from koclip.evaluation.sets import open_set
from koclip.search import build, open_index
from koclip.text.normalize import usable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where runs of one process, of one in pieces, and of two are."""
    folder = tmp_path_factory.mktemp("dirty")
    two_dirty.write(folder)
    for count in (1, 2):
        run_in_processes([two_dirty.__file__, str(folder)], count)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> dirty.Dirty:
    return dirty.described(folder)


def rows(data: dirty.Dirty) -> tuple[list[Row], list[Row]]:
    """Return the rows that can be used and those that cannot, as they are read."""
    used, listed = [], []
    for config, good, bad in zip(data.sources, data.used, data.listed, strict=True):
        source = open_source(config)
        assert len(source) == len(good | bad)
        used += source.rows(sorted(good))
        listed += source.rows(sorted(bad))
    return used, listed


def skipped(run: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_row_is_used_or_listed(data: dirty.Dirty) -> None:
    """In one pass over the data, which ends with a batch."""
    used, listed = rows(data)
    config = DataConfig(sources=data.sources, length_pool=1)
    size = next(size for size in (25, 5) if (len(used) + len(listed)) % size == 0)
    batches = train_loader(Assembler(config, tiny_tokenizer(), Views(config, 32)), BatchPart(size))
    batches = list(itertools.islice(batches, (len(used) + len(listed)) // size))
    assert {key for batch in batches for key in batch.keys} == {row.key for row in used}
    left_out = [skip.key for batch in batches for skip in batch.skipped]
    assert set(left_out) == {row.key for row in listed}


@pytest.mark.parametrize("name", two_dirty.RUNS)
@pytest.mark.parametrize("other", ["2", "pieces"])
def test_processes_and_pieces_train_as_one(folder: Path, name: str, other: str) -> None:
    """Losses to 2e-6; weights to 2e-5 in thirty steps, where clean data are held to 5e-6 in six.

    But for the biases of keys: softmax takes away what they add, so their gradient is rounding, which AdamW scales up.
    """
    runs = [folder / f"{name}-{way}" for way in ("1", other)]
    alone, two = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert alone.keys() == two.keys()
    trained = {key: value for key, value in alone.items() if not key.endswith("k_proj.bias")}
    assert max((two[key] - value).abs().max().item() for key, value in trained.items()) <= 2e-5
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == two_dirty.STEPS
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


@pytest.mark.parametrize("name", two_dirty.RUNS)
@pytest.mark.parametrize("way", ["1", "2", "pieces"])
def test_a_run_lists_what_it_could_not_use_once(folder: Path, data: dirty.Dirty, name: str, way: str) -> None:
    left_out = skipped(folder / f"{name}-{way}")
    assert sorted(left_out) == sorted(row.key for row in rows(data)[1])


@pytest.mark.parametrize("name", two_dirty.RUNS)
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, data: dirty.Dirty, name: str) -> None:
    run = folder / f"{name}-resumed"
    shutil.copytree(folder / f"{name}-1", run)
    for left in (run / "checkpoints").glob("step-*"):
        if left.name != f"step-{two_dirty.STEPS // 2:08d}":
            shutil.rmtree(left)
    shutil.rmtree(run / "model")
    two_dirty.RUNS[name](folder, "resumed", "--resume", "auto")
    whole, two = (load_file(folder / f"{name}-{way}" / "model" / "model.safetensors") for way in ("1", "resumed"))
    assert all(two[key].equal(value) for key, value in whole.items())
    assert sorted(skipped(run)) == sorted(row.key for row in rows(data)[1])


def test_evaluation_has_the_numbers_of_the_rows_that_can_be_used(
    folder: Path, data: dirty.Dirty, tmp_path: Path
) -> None:
    """The same rows, cleaned, in a table of their own: each picture once, with all its captions."""
    write_source(tmp_path / "model")
    embedder = Embedder(load(str(tmp_path / "model"), "cpu"), 16)
    tasks = ["retrieval", "languages", "stress"]
    for config, good, bad in zip(data.sources, data.used, data.listed, strict=True):
        named = dataclasses.replace(config, name="dirty")
        with_flaws = open_set(EvalSetConfig(source=named, tasks=tasks, max_skipped_fraction=0.9))
        pictures: dict[bytes, dict[str, list[str]]] = {}
        for row in open_source(config).rows(sorted(good)):
            cells = pictures.setdefault(bytes(read(row.image)), {"ko": [], "en": []})
            for language, own in cells.items():
                own += row.captions[language]
        table = [{"image": image, **cells} for image, cells in pictures.items()]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "clean.parquet")
        source = SourceConfig(path=str(tmp_path / "clean.parquet"), captions=dirty.CAPTIONS, name="dirty")
        clean = open_set(EvalSetConfig(source=source, tasks=tasks))
        assert counts(with_flaws) == {"rows": len(good | bad), "images": len(pictures), "skipped": len(bad)}
        assert evaluate(embedder, [with_flaws]) == evaluate(embedder, [clean])
        assert all(usable(texts) for captions in with_flaws.captions for texts in captions.values())


def test_an_index_holds_or_lists_every_picture(folder: Path, data: dirty.Dirty, tmp_path: Path) -> None:
    """A picture without a caption can be found, too."""
    write_source(tmp_path / "model")
    encoder = load(str(tmp_path / "model"), "cpu")
    for number, config in enumerate(data.sources):
        index_config = IndexConfig(model="tiny", source=config, approximate="no")
        count, left_out = build.build(index_config, encoder, tmp_path / str(number))
        index = open_index(tmp_path / str(number))
        held = {index.entry(place).record["key"] for place in range(len(index))}
        keys = [row.key for row in open_source(config).rows(range(len(data.used[number] | data.listed[number])))]
        assert sorted([*held, *(skip.key for skip in left_out)]) == sorted(keys)
        assert {keys[place] for place in data.used[number]} <= held
        assert count == len(index) == len(held)
