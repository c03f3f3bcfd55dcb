"""The benchmarks of `koclip curate` run, at tiny sizes."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_curation import encoded, picture, write_rows

from koclip import config
from koclip.curation import pipeline
from koclip.curation.batch import DETAIL, KEY, REASON
from koclip.curation.duplicates import NEAR
from koclip.curation.scores import LOW
from koclip.metrics import Metric

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import curation_scale
import curation_training

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


def test_training_on_cleaned_pairs_is_compared_with_training_on_noisy_pairs(tmp_path, monkeypatch, capsys) -> None:
    """From the files of runs, which are replaced here by written numbers."""
    commands = []

    def start_once(run: Path, recipe: str, *words: str) -> None:
        commands.append(recipe)
        command = ["--output_dir", str(run), *words]
        if recipe == "curate.py":
            source = config.parse(config.CurateConfig, command).sources[0]
            wrong = pq.read_table(source.path)["wrong"].to_pylist()
            keys = [f"{source.key}/{row}" for row in range(len(wrong)) if wrong[row] or row == wrong.index(False)]
            lines = [json.dumps({"key": key, "reason": LOW}) for key in keys]
            run.mkdir(parents=True)
            (run / "dropped.jsonl").write_text("\n".join(lines), encoding="utf-8")
        elif recipe == "align.py":
            assert config.parse(config.AlignConfig, command).data.sources[0].path.endswith(".parquet")
        else:
            parsed = config.parse(config.EvaluateConfig, command)
            assert "noisy" in str(parsed.source)
            assert "cleaned" in str(parsed.model)
            shares = {"": 0.42, "source_": 0.4, "gain_": 0.02}
            metrics = {
                f"flickr8k_ko/ko/{prefix}text_to_image/recall@10": Metric(share, (share - 0.01, share + 0.01), 9)
                for prefix, share in shares.items()
            }
            run.mkdir(parents=True)
            written = {"metrics": {key: metric.to_dict() for key, metric in metrics.items()}}
            (run / "results.json").write_text(json.dumps(written), encoding="utf-8")

    monkeypatch.setattr(curation_training, "start_once", start_once)
    pairs = write_rows(tmp_path / "train.parquet", [f"{row}번 그림" for row in range(10)], [encoded(picture(1))] * 10)
    column = next(iter(pairs.captions.values()))
    table = pq.read_table(pairs.path)
    pq.write_table(
        table.rename_columns(["captions_ko" if name == column else name for name in table.column_names]), pairs.path
    )
    options = ["--data", pairs.path, "--split", "train[2:10]", "--share", "0.5", "--seeds", "0", "1"]
    curation_training.main([*options, "--output_dir", str(tmp_path / "runs")])
    assert commands == ["curate.py", *(["align.py"] * 2 + ["evaluate.py"]) * 2]
    printed = capsys.readouterr().out
    assert "8 rows, 4 wrong; 5 dropped for their score, 4 of them wrong" in printed
    assert printed.count("42.0 (41.0 to 43.0)") == 2
    assert printed.count("40.0 (39.0 to 41.0)") == 2
    assert printed.count("+2.0 (+1.0 to +3.0)") == 2
    noisy = pq.read_table(tmp_path / "runs" / "noisy.parquet").to_pylist()
    originals = [[f"{row}번 그림"] for row in range(2, 10)]
    assert [row["wrong"] for row in noisy] == [
        row["captions_ko"] != text for row, text in zip(noisy, originals, strict=True)
    ]
