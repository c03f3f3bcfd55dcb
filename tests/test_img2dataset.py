"""What img2dataset writes: downloaded pairs are rows, and failed downloads are counted by status and listed.

The files are as img2dataset 1.47 wrote them from a list with the columns url, caption, caption_en and license.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_on_disk import write_tar
from test_curation import encoded, picture
from test_curation import settings as curation

from koclip.config import EvalSetConfig, SourceConfig
from koclip.curation import report
from koclip.curation.pipeline import curate
from koclip.data.formats.files import SourceError
from koclip.data.sources import open_source
from koclip.evaluation.sets import open_set
from koclip.runs.directory import RunDirectory

ERRORS = {
    (0, 2): ("failed_to_download", "HTTP Error 404: Not Found"),
    (1, 0): ("failed_to_resize", "Image decoding error"),
    (1, 3): ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive"),
    (2, 0): ("failed_to_download", "HTTP Error 404: Not Found"),
}
SHARDS, ROWS = 3, 4  # rows of a shard
NAMES = ["caption_en", "license", "caption", "url", "key", "status", "error_message", "width", "height"]
SCHEMA = pa.schema([(name, pa.int32() if name in ("width", "height") else pa.string()) for name in NAMES])
EXPECTED = [
    (f"공원에서 노는 강아지 {shard}-{row}마리", f"photo {shard}-{row}", encoded(picture(10 * shard + row)))
    for shard in range(SHARDS)
    for row in range(ROWS)
    if (shard, row) not in ERRORS
]
LANGUAGES = {"ko": "caption", "en": "caption_en"}


def rows_of(shard: int) -> list[dict[str, Any]]:
    rows = []
    for row in range(ROWS):
        status, error = ERRORS.get((shard, row), ("success", None))
        texts = {
            "caption": f"공원에서 노는 강아지 {shard}-{row}마리",
            "caption_en": f"photo {shard}-{row}",
            "license": ("by", "cc0")[row % 2],
        }
        url = {"url": f"https://example.com/{shard}/{row}.png", "key": f"{shard:05d}{row:04d}"}
        sizes = dict.fromkeys(("width", "height"), None if error else 48)
        rows.append({**texts, **url, "status": status, "error_message": error, **sizes})
    return rows


def write(folder: Path, kind: str, suffix: str = "jpg") -> SourceConfig:
    """Write the output folder of img2dataset; return a source that reads it."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        rows, name = rows_of(shard), f"{shard:05d}"
        own = {row["key"]: encoded(picture(10 * shard + number)) for number, row in enumerate(rows)}
        good = [row for row in rows if row["status"] == "success"]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if kind == "parquet":
            contents = [own[row["key"]] if row in good else None for row in rows]
            table = table.append_column(suffix, pa.array(contents, pa.binary()))
        elif kind == "webdataset":
            samples = [
                {suffix: own[row["key"]], "txt": row["caption"].encode(), "json": json.dumps(row, indent=4).encode()}
                for row in good
            ]
            write_tar(folder / f"{name}.tar", samples)
        else:
            (folder / name).mkdir()
            for row in good:
                (folder / name / f"{row['key']}.{suffix}").write_bytes(own[row["key"]])
                (folder / name / f"{row['key']}.json").write_text(json.dumps(row), encoding="utf-8")
        pq.write_table(table, folder / f"{name}.parquet")
        (folder / f"{name}_stats.json").write_text('{"count": 4}', encoding="utf-8")
    return SourceConfig(path=str(folder), name="raw", captions=LANGUAGES)


def contents(source: SourceConfig) -> list[tuple[str, str, bytes]]:
    rows = list(open_source(source).iter_rows())
    assert len({row.key for row in rows}) == len(rows)
    images = [row.image if isinstance(row.image, bytes) else Path(str(row.image)).read_bytes() for row in rows]
    return sorted(
        (row.captions["ko"][0], row.captions["en"][0], image) for row, image in zip(rows, images, strict=True)
    )


KINDS = ["webdataset", "parquet", "files"]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("kind", KINDS)
def test_downloaded_pairs_are_rows_and_failures_are_listed(tmp_path, kind, suffix):
    source = write(tmp_path / "raw", kind, suffix)
    assert contents(source) == EXPECTED
    left_out = list(open_source(source).left_out)
    assert Counter(skip.reason for skip in left_out) == Counter(
        f"{status}: {error}" for status, error in ERRORS.values()
    )
    assert [skip.key.rpartition("/")[2] for skip in left_out] == [f"{shard:05d}{row:04d}" for shard, row in ERRORS]
    assert len({skip.key for skip in left_out}) == len(ERRORS)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_the_list_select_rows_in_every_layout(tmp_path, kind):
    source = write(tmp_path / "raw", kind)
    chosen = replace(source, where={"license": ["cc0"]})
    assert contents(chosen) == [row for row in EXPECTED if int(row[1][-1]) % 2]


@pytest.mark.parametrize(
    ("kind", "pattern"), [("webdataset", "*.tar"), ("parquet", "*.parquet"), ("files", "0*.parquet")]
)
def test_files_may_be_named_by_a_pattern(tmp_path, kind, pattern):
    source = write(tmp_path / "raw", kind)
    named = replace(source, path=str(tmp_path / "raw" / pattern), format="img2dataset")
    assert contents(named) == EXPECTED
    assert len(list(open_source(named).left_out)) == len(ERRORS)


def test_equal_keys_in_two_folders_are_listed_apart(tmp_path):
    for part in ("a", "b"):
        write(tmp_path / "raw" / part, "webdataset")
    source = SourceConfig(path=str(tmp_path / "raw"), format="img2dataset", captions=LANGUAGES)
    assert len(list(open_source(source).iter_rows())) == 2 * len(EXPECTED)
    assert len({skip.key for skip in open_source(source).left_out}) == 2 * len(ERRORS)


@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_curation_count_the_failures(tmp_path, kind, capsys):
    source = write(tmp_path / "raw", kind)
    directory = RunDirectory("pretrain", str(tmp_path / "run"), resume=False)
    for _ in range(2):  # a resumed run lists them once
        directory.list_left_out(open_source(source))
    lines = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {f"{status}: {error}" for status, error in ERRORS.values()}
    assert len(lines) == len(ERRORS)
    said = "".join(capsys.readouterr())
    assert "3 failed_to_download" in said
    assert "1 failed_to_resize" in said

    with pytest.raises(SourceError, match="max_skipped_fraction: 4 of 12 rows"):
        open_set(EvalSetConfig(source=source))
    eval_set = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.5))
    assert (eval_set.num_rows, len(eval_set.images), len(eval_set.skipped)) == (12, 8, 4)
    cut = open_set(EvalSetConfig(source=source, max_images=4))
    assert (len(cut.images), cut.skipped) == (4, [])

    content = curate(curation(source, tmp_path / "clean"))
    assert (content["rows"]["read"], content["not_rows"]) == (len(EXPECTED), len(ERRORS))
    dropped = (tmp_path / "clean" / report.DROPPED).read_text(encoding="utf-8")
    assert dropped.count("failed_to_download") == 3


@pytest.mark.parametrize("name", ["rows.parquet", "nothing.txt"])
def test_other_folders_are_refused(tmp_path, name):
    if name == "rows.parquet":
        pq.write_table(pa.table({"jpg": [b""], "caption": ["개"]}), tmp_path / name)
    with pytest.raises(SourceError, match="output folder of img2dataset"):
        open_source(SourceConfig(path=str(tmp_path), format="img2dataset", captions=LANGUAGES))
