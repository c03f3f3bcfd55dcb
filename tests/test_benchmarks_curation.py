"""The benchmarks of `koclip curate` run, at tiny sizes."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from koclip.curation import pipeline
from koclip.curation.batch import DETAIL, KEY, REASON
from koclip.curation.duplicates import NEAR

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import curation_scale

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture(autouse=True)
def own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LOCAL", pipeline.LOCAL)  # the benchmark replaces them


def test_planted_near_duplicates_are_found_and_queries_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    write = pipeline._write_unit

    def keep_table(unit, config, folder, compared):
        tables.append(pq.read_table(folder.table(compared, unit)).to_pydict())
        yield from write(unit, config, folder, compared)

    monkeypatch.setattr(pipeline, "_write_unit", keep_table)
    result = curation_scale.measure(3_000, num_workers=1, max_per_query=40)
    (table,) = tables
    near = [place for place, reason in enumerate(table[REASON]) if reason == NEAR]
    assert 100 < len(near) < 200  # 5 % are planted
    places = {key: place for place, key in enumerate(table[KEY])}
    assert all(abs(places[table[DETAIL][place]] - place) <= 3 for place in near)  # of a row nearby, also in a chain
    assert "query is full" in table[REASON]
    assert result["kept"] == table[REASON].count("")
    assert result["seconds"] > 0
    assert 100e6 < result["memory"] < 20e9


def test_each_number_of_rows_is_printed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    numbers = {"seconds": 12.0, "memory": 1.5e9, "worker_memory": 5e8, "kept": 90.0}
    monkeypatch.setattr(curation_scale, "run_worker", lambda *_: numbers)
    curation_scale.main(["--rows", "100", "20000"])
    printed = capsys.readouterr().out
    assert "100 rows: 12.0 s (1200.00 s per 10,000 rows)" in printed
    assert "20,000 rows: 12.0 s (6.00 s per 10,000 rows)" in printed
    assert "memory 1.50 GB, of a worker 0.50 GB; 90 rows kept" in printed
