"""skipped.jsonl lists every sample that is left out, once: a row's key tells it from all others."""

import dataclasses
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from helpers.warm_python import run_in_processes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources_on_disk import all_rows

from koclip import config
from koclip.config import EvalSetConfig, SourceConfig
from koclip.data.sources import open_source
from koclip.evaluation.sets import open_set

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain.py"
SMALL = [
    *("--train.num_threads", "1", "--train.tracker", "none", "--train.num_steps", "12", "--train.log_every", "5"),
    *("--optim.warmup_steps", "1", "--tokenizer.vocab_size", "600", "--data.num_workers", "0", "--eval.sets", "[]"),
    *("--data.max_skipped_fraction", "0.9", "--data.length_pool", "1", "--data.shuffle_buffer", "4"),
    *("--model.image_width", "32", "--model.text_width", "32", "--model.image_layers", "1"),
]


def args(*sources: SourceConfig, output: Path, **train: int) -> list[str]:
    values = [f"--train.{name}={value}" for name, value in train.items()]
    spec = json.dumps([config.to_dict(source) for source in sources])
    return [*SMALL, *values, "--data.sources", spec, "--output_dir", str(output)]


def pretrain(*sources: SourceConfig, output: Path) -> list[dict[str, str]]:
    """Run the recipe in this process and return what it lists."""
    spec = importlib.util.spec_from_file_location("pretrain", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(config.parse(config.PretrainConfig, args(*sources, output=output, batch_size=4)))
    return listed(output)


def listed(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


def table(path: Path, encoded, broken: int = 2, whole: int = 4) -> SourceConfig:
    """Write rows that are all named and captioned alike; the first have broken images."""
    path.parent.mkdir(exist_ok=True)
    images = [b"broken"] * broken + [encoded((n, 0, 0)) for n in range(whole)]
    rows = [{"image": {"bytes": image, "path": "photo.png"}, "ko": "사진", "id": "same"} for image in images]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return SourceConfig(path=str(path), captions={"ko": "ko"})


def check(lines: list[dict[str, str]], count: int, *sources: SourceConfig) -> None:
    assert len(lines) == len({line["key"] for line in lines}) == count
    assert {line["source"] for line in lines} == {source.path for source in sources}
    assert all(line["reason"] for line in lines)


def test_two_sources_of_one_base_name(tmp_path, encoded) -> None:
    sources = [table(tmp_path / folder / "rows.parquet", encoded) for folder in "ab"]
    check(pretrain(*sources, output=tmp_path / "run"), 4, *sources)


def test_two_parts_of_one_file(tmp_path, encoded) -> None:
    source = table(tmp_path / "rows.parquet", encoded, whole=2)
    pq.write_table(pa.concat_tables([pq.read_table(source.path)] * 2), source.path)
    halves = [dataclasses.replace(source, split=split) for split in ("train[:4]", "train[4:]")]
    check(pretrain(*halves, output=tmp_path / "run"), 4, source)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_a_stream_of_equal_names_and_captions(tmp_path, encoded, kind) -> None:
    if kind == "parquet":
        source = table(tmp_path / "rows.parquet", encoded, broken=3)
    elif kind == "jsonl":
        (tmp_path / "good.png").write_bytes(encoded())
        names = ["missing.png"] * 3 + ["good.png"] * 4
        lines = [json.dumps({"image": name, "ko": "사진"}) for name in names]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        source = SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "ko"})
    else:
        for folder, image in (("a", b"broken"), ("b", b"broken"), ("c", b"broken"), ("d", encoded())):
            write_tar(tmp_path / folder / "shard.tar", image)
        source = SourceConfig(path=str(tmp_path / "*" / "shard.tar"), image="png", captions={"ko": "txt"})
    check(pretrain(dataclasses.replace(source, streaming=True), output=tmp_path / "run"), 3, source)


def write_tar(path: Path, image: bytes) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for extension, data in (("png", image), ("txt", "사진".encode())):
            info = tarfile.TarInfo(f"photo.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_two_processes_list_what_one_does(tmp_path, encoded) -> None:
    source = table(tmp_path / "rows.parquet", encoded, broken=4)
    alone = pretrain(source, output=tmp_path / "one")
    run_in_processes([str(RECIPE), *args(source, output=tmp_path / "two", batch_size=2)], 2)
    both = listed(tmp_path / "two")
    check(both, 4, source)
    assert sorted(line["key"] for line in both) == sorted(line["key"] for line in alone)


def test_an_evaluation_set_names_the_source(tmp_path, encoded) -> None:
    source = table(tmp_path / "rows.parquet", encoded)
    skipped = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.5)).skipped
    check([skip._asdict() for skip in skipped], 2, source)


def test_a_name_that_is_no_utf_8_can_be_listed(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "\\ud800.png", "ko": "개"}\n', encoding="utf-8")
    (row,) = all_rows(open_source(SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "ko"})))
    assert row.key.encode("utf-8")


names = st.sampled_from(["", "a.png", "a/b.png", "0", "1", "1/a.png", "0/1"])
row = st.fixed_dictionaries({"image": names, "id": names, "ko": st.sampled_from(["", "개"])})


@given(data=st.data(), streaming=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_have_keys_of_their_own(tmp_path, data: Any, streaming: bool) -> None:
    """Whatever rows, files and sources are called; and the same keys again, in part and in another order."""
    keys: list[str] = []
    for folder in data.draw(st.lists(st.sampled_from(["a", "b", "rows~0", "한"]), unique=True, min_size=1)):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for name in data.draw(st.lists(st.sampled_from(["rows", "rows 2", "0", "1"]), unique=True, min_size=1)):
            rows = data.draw(st.lists(row, min_size=1, max_size=4))
            (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        common = {"path": str(place / "*.jsonl"), "name": "rows", "streaming": streaming}
        for columns in ({"ko": "ko"}, {"en": "ko"}):
            source = open_source(SourceConfig(**common, captions=columns))
            own = [row.key for row in all_rows(source)]
            keys += own
            if streaming:
                assert sorted(own) == sorted(row.key for row in source.rows(1, 2, 3, 0, 1))
            else:
                assert [row.key for row in source.rows([len(source) - 1])] == own[-1:]
            kept = open_source(SourceConfig(**common, captions=columns, where={"ko": ["개", ""]}))
            assert [row.key for row in all_rows(kept)] == own
    assert len(set(keys)) == len(keys)
