"""A source's files are found by their names, whatever these hold, and in any Unicode form."""

import gzip
import json
import os
import shutil
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sources_on_disk import WRITERS, all_rows, arrow, colour, csv_file, json_lines, parquet, tsv_file, webdataset

from koclip.config import ConfigError, EvalSetConfig, IndexConfig, SourceConfig
from koclip.data.formats.files import SourceError
from koclip.data.sources import open_source
from koclip.evaluation.sets import open_set
from koclip.search.build import Collection

FORMS = ("NFC", "NFD")
SPECIAL = "[]*?!#%{}()^~&'\",;:=+@$ -_.|<>\\"
names = st.text(alphabet="가힣고양이éÅab1" + SPECIAL, min_size=1, max_size=12)
forms = st.sampled_from(FORMS)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def form(text: str, kind: str) -> str:
    return unicodedata.normalize(kind, text)


def decoys(name: str) -> set[str]:
    """Return other names: what `name` matches as a pattern, and what looks like it."""
    plain = name.replace("[", "").replace("]", "")
    changed = {
        plain,
        name.replace("*", "x"),
        name.replace("?", "y"),
        name.split("#")[0],
        name.split("%")[0],
        name + "1",
    }
    return {other for other in changed if other.strip(". ") and form(other, "NFC") != form(name, "NFC")}


def write_lines(path: Path, *captions: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in captions), encoding="utf-8")


def captions_of(path: Path | str, **options) -> list[str]:
    source = SourceConfig(path=str(path), image=None, captions={"ko": "text"}, **options)
    return [row.captions["ko"][0] for row in all_rows(open_source(source))]


@quick
@given(folder=names, name=names, written=forms, asked=forms, streaming=st.booleans())
@example(folder="data[1]", name="part[1]", written="NFC", asked="NFC", streaming=False)
@example(folder="사진", name="고양이 *", written="NFD", asked="NFC", streaming=True)
@example(folder="사진", name="a?b#c%20d", written="NFC", asked="NFD", streaming=False)
def test_a_file_that_exists_is_that_file(folder, name, written, asked, streaming) -> None:
    assume(folder.strip(". ") and "::" not in folder + name)
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, form(folder, written))
        place.mkdir()
        for other in decoys(name):
            write_lines(place / f"{form(other, written)}.jsonl", "another")
        write_lines(place / f"{form(name, written)}.jsonl", "가", "나")
        path = Path(root, form(folder, asked), f"{form(name, asked)}.jsonl")
        assert captions_of(path, streaming=streaming) == ["가", "나"]


@quick
@given(folder=names, name=names, written=forms, asked=forms)
@example(folder="강아지", name="고양이[1]", written="NFD", asked="NFC")
def test_pictures_are_found_by_the_names_in_a_table(folder, name, written, asked, encoded) -> None:
    assume(folder.strip(". "))
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, form(folder, written))
        place.mkdir()
        for other in decoys(name):
            (place / f"{form(other, written)}.png").write_bytes(encoded((1, 1, 1)))
        (place / f"{form(name, written)}.png").write_bytes(encoded((9, 8, 7)))
        line = json.dumps({"image": f"{form(folder, asked)}/{form(name, asked)}.png", "text": "가"})
        Path(root, "rows.jsonl").write_text(line, encoding="utf-8")
        (row,) = all_rows(open_source(SourceConfig(path=f"{root}/rows.jsonl", captions={"ko": "text"})))
        assert colour(row) == (9, 8, 7)


def test_what_is_written_comes_before_its_other_forms(tmp_path, encoded) -> None:
    """Both forms of a name may lie side by side; a name in a mixed form is found by all that its folder holds."""
    for kind, shade in zip(FORMS, (10, 20), strict=True):
        (tmp_path / f"{form('각', kind)}.png").write_bytes(encoded((shade, 0, 0)))
    mixed = form("각", "NFD") + "각"
    (tmp_path / f"{mixed}.png").write_bytes(encoded((30, 0, 0)))
    cells = [form("각", "NFC"), form("각", "NFD"), "각각", form("각각", "NFD"), "없음"]
    lines = [json.dumps({"image": f"{cell}.png", "text": "가"}) for cell in cells]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = all_rows(open_source(SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "text"})))
    assert [colour(row)[0] for row in rows[:-1]] == [10, 20, 30, 30]
    assert not rows[-1].image.exists()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part*.jsonl", ["part1", "part[1]", "part고"]),
        ("part[1].jsonl", ["part[1]"]),
        ("part[12].jsonl", ["part1"]),
        ("part?.jsonl", ["part1", "part고"]),
        ("part[!1].jsonl", ["part고"]),
        ("par[t]고.jsonl", ["part고"]),
        ("sub[[]1]/*.jsonl", ["deep"]),
        ("sub[1]/*.jsonl", ["deep"]),
        ("**/*.jsonl", ["part1", "part[1]", "part고", "deep", "plain"]),
        ("s**/d*.jsonl", ["deep"]),
        ("*.jsonl*", ["*", "part1", "part[1]", "part고"]),
        ("*.jsonl", ["*"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_gives_each_file_once(tmp_path, pattern, expected, streaming) -> None:
    files = ["part1", "part[1]", form("part고", "NFD"), "sub[1]/deep", "sub1/plain", ".hidden", "sub[1]/.hidden"]
    for name in [*files, *(["*"] if "*" in expected else [])]:
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_lines(path, form(path.stem, "NFC"))
    assert sorted(captions_of(tmp_path / pattern, streaming=streaming)) == sorted(expected)


def test_a_chain_of_archives_is_refused_by_name(tmp_path) -> None:
    """`datasets` would open the file `a` instead."""
    write_lines(tmp_path / "a", "another")
    write_lines(tmp_path / "a::b.jsonl", "가")
    with pytest.raises(SourceError, match=r"a::b\.jsonl.*rename"):
        captions_of(tmp_path / "a::b.jsonl")


@pytest.mark.parametrize("key", ["path", "image_root"])
def test_no_file_has_nul_in_its_name(key) -> None:
    with pytest.raises(ConfigError, match=rf"sources\[\]\.{key}: got 'a\\x00b'"):
        SourceConfig(**{key: "a\0b"})


@pytest.mark.parametrize("cell", ["a\0b.png", "\ud800.png", "가" * 300 + ".png", "/", "."])
def test_a_cell_that_names_no_file_is_left_out_and_listed(tmp_path, encoded, cell) -> None:
    for place in range(3):
        (tmp_path / f"{place}.png").write_bytes(encoded((place, 0, 0)))
    lines = [json.dumps({"image": name, "text": "가"}) for name in ("0.png", cell, "1.png", "2.png")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "text"})
    eval_set = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.5))
    assert len(eval_set.images) == 3
    assert len(eval_set.skipped) == 1


@pytest.mark.parametrize("name", ["가" * 300, "a/" * 3_000 + "b", "[", "a[/b", "**/[!", "없음*"])
def test_a_path_that_no_file_can_have_is_not_found(tmp_path, name) -> None:
    with pytest.raises(SourceError, match=r"\.jsonl"):
        captions_of(tmp_path / f"{name}.jsonl")


def packed(path: Path, name: str) -> str:
    """Move a file to another name, packed if that says so; return its path."""
    data = path.read_bytes()
    path.unlink()
    path.with_name(name).write_bytes(gzip.compress(data) if name.lower().endswith((".gz", ".tgz")) else data)
    return str(path.with_name(name))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("write", "file", "name"),
    [
        (csv_file, "rows.csv", "ROWS.CSV"),
        (csv_file, "rows.csv", "rows.csv.gz"),
        (tsv_file, "rows.tsv", "rows.TSV"),
        (tsv_file, "rows.tsv", "rows.tsv.gz"),
        (json_lines, "rows.jsonl", "rows.v2.JSONL"),
        (json_lines, "rows.jsonl", "Rows.Jsonl.GZ"),
        (parquet, "rows.parquet", "rows.PARQUET"),
        (arrow, "rows.arrow", "rows.Arrow"),
        (webdataset, "shard-000.tar", "shard-000.TAR"),
        (webdataset, "shard-000.tar", "shard-000.tar.gz"),
        (webdataset, "shard-000.tar", "shard-000.tgz"),
    ],
)
def test_the_format_is_told_in_any_letter_case_and_packed(tmp_path, records, write, file, name, streaming) -> None:
    source = write(tmp_path, records)
    first = replace(source, path=str(tmp_path / file))
    expected = [(colour(row), row.captions) for row in all_rows(open_source(first))]
    moved = replace(source, path=packed(tmp_path / file, name), streaming=streaming)
    assert [(colour(row), row.captions) for row in all_rows(open_source(moved))] == expected
    assert len(expected) >= 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [csv_file, json_lines])
def test_a_packed_file_that_breaks_off_is_refused(tmp_path, records, write, streaming) -> None:
    records = [{**record, "caption_en": os.urandom(40_000).hex()} for record in records]
    source = write(tmp_path, records)
    path = Path(packed(Path(source.path), f"{Path(source.path).name}.gz"))
    path.write_bytes(path.read_bytes()[:-100])
    config = replace(source, path=str(path), streaming=streaming)
    with pytest.raises(SourceError, match="rows"):
        all_rows(open_source(config))


def test_files_of_several_formats_or_none_are_refused(tmp_path) -> None:
    write_lines(tmp_path / "a.jsonl", "가")
    (tmp_path / "b.csv").write_text("text\n가\n")
    (tmp_path / "c.txt").write_text("text\n가\n")
    for path in ("*", "[ab].*", "c.txt"):
        with pytest.raises(SourceError, match=r"suffixes are \["):
            captions_of(tmp_path / path)
    assert captions_of(tmp_path / "c.txt", format="csv") == ["가"]


@pytest.mark.parametrize("write", [parquet, arrow, csv_file, json_lines, webdataset])
def test_a_folder_of_tables_says_what_to_write(tmp_path, records, write) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    source = write(tmp_path, records)
    for file in tmp_path.glob("*.*"):
        shutil.move(file, folder / file.name)
    if (tmp_path / "pictures").exists():
        shutil.move(tmp_path / "pictures", tmp_path.parent / f"{tmp_path.name}-pictures")
    config = replace(source, path=str(folder))
    suffix = next(folder.iterdir()).suffix
    with pytest.raises(SourceError, match=rf"tables/\*\{suffix}, .*format: (\w+) "):
        open_source(config)
    whole = replace(source, path=str(folder / f"*{suffix}"))
    named = replace(config, format=open_format(suffix))
    assert [row.captions for row in all_rows(open_source(named))] == [
        row.captions for row in all_rows(open_source(whole))
    ]


def open_format(suffix: str) -> str:
    return {".jsonl": "json", ".tar": "webdataset"}.get(suffix, suffix[1:])


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match=tmp_path.name):
        open_source(SourceConfig(path=str(tmp_path)))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_has_saved_is_read(tmp_path, streaming) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(4)]}) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "두[개]")
    parts["test"].save_to_disk(tmp_path / "one")
    expected = [f"test {number}" for number in range(4)]
    assert captions_of(tmp_path / "one", streaming=streaming) == expected
    assert captions_of(tmp_path / form("두[개]", "NFD"), split="test", streaming=streaming) == expected
    assert captions_of(tmp_path / "두[개]", split="test[1:3]", streaming=streaming) == expected[1:3]
    with pytest.raises(SourceError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        captions_of(tmp_path / "두[개]", split="dev", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_format_that_save_to_disk_keeps_does_not_matter(tmp_path, encoded, streaming) -> None:
    shape = {
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=["새", "개"]),
        "text": datasets.Value("string"),
    }
    rows = [{"image": encoded((number, 0, 0)), "kind": number, "text": f"{number}번"} for number in range(2)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(shape))
    table.with_format("numpy", columns=["kind"]).save_to_disk(tmp_path / "saved")
    source = SourceConfig(path=str(tmp_path / "saved"), captions={"ko": "text"}, label="kind", streaming=streaming)
    read = [(colour(row)[0], row.label, row.captions) for row in all_rows(open_source(source))]
    assert read == [(0, "새", {"ko": ["0번"]}), (1, "개", {"ko": ["1번"]})]


def replace_unnoticed(path: Path, write) -> None:
    """Write a file anew, with the time stamp that it had."""
    status = path.stat()
    write()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub", "image_folder"])
@pytest.mark.parametrize("second", ["나", "나나나"])  # of the same size, or not
def test_a_file_replaced_with_its_time_stamp_gives_its_new_rows(tmp_path, encoded, kind, second) -> None:
    name = {"hub": "train.csv", "image_folder": "metadata.csv"}.get(kind, f"rows.{kind}")
    (tmp_path / "a.png").write_bytes(encoded())

    def write(text: str) -> None:
        if kind == "jsonl":
            write_lines(tmp_path / name, text)
        elif kind == "parquet":
            pq.write_table(pa.table({"text": [text]}), tmp_path / name)
        else:
            column = "file_name" if kind == "image_folder" else "name"
            (tmp_path / name).write_text(f"{column},text\na.png,{text}\n", encoding="utf-8")

    path = tmp_path if kind in ("hub", "image_folder") else tmp_path / name
    if kind == "hub":
        (tmp_path / "a.png").unlink()
    options = {"format": "hub"} if kind == "hub" else {}
    write("가")
    assert captions_of(path, **options) == ["가"]
    replace_unnoticed(tmp_path / name, lambda: write(second))
    assert captions_of(path, **options) == [second]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_without_a_value_in_the_first_file_has_the_type_of_the_others(tmp_path, kind, streaming) -> None:
    tables = [
        pa.table({"text": pa.nulls(2), "meta": [{"ko": None}, {"ko": None}], "many": [[None], []]}),
        pa.table({"text": ["가", None], "meta": [{"ko": "나"}, {"ko": None}], "many": [["다", "라"], []]}),
    ]
    for number, table in enumerate(tables):
        path = tmp_path / f"part-{number}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    captions = {"ko": "text", "en": "meta.ko", "ja": "many"}
    path = str(tmp_path / f"part-*.{kind}")
    source = open_source(SourceConfig(path=path, image=None, captions=captions, streaming=streaming))
    expected = [{}, {}, {"ko": ["가"], "en": ["나"], "ja": ["다", "라"]}, {}]
    assert [row.captions for row in all_rows(source)] == expected
    cells = [row.captions for row in source.iter_rows(images=False)]
    assert list(cells) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_and_where_are_compared_in_one_form(tmp_path, encoded, streaming) -> None:
    rows = [{"image": encoded((n, 0, 0)), "kind": form(kind, "NFD")} for n, kind in enumerate(["고양이", "강아지"] * 2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for asked in FORMS:
        where = {"kind": [form("고양이", asked)]}
        common = {"path": str(tmp_path / "rows.parquet"), "label": "kind", "captions": {}, "streaming": streaming}
        assert [row.label for row in all_rows(open_source(SourceConfig(**common, where=where)))] == ["고양이"] * 2


@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("asked", FORMS)
def test_class_folders_and_class_files_are_found_in_any_form(tmp_path, encoded, written, asked) -> None:
    for number, kind in enumerate(["고양이", "강아지"]):
        folder = tmp_path / form("사진첩", written) / form(kind, written)
        folder.mkdir(parents=True)
        for place in range(2):
            (folder / f"{place}.png").write_bytes(encoded((number, place, 0)))
    classes = tmp_path / f"{form('이름', written)}.yaml"
    classes.write_text("- {key: 고양이, ko: 고양이}\n- {key: 강아지, ko: 강아지}\n", encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / form("사진첩", asked)), label="label", captions={})
    asked_classes = str(tmp_path / f"{form('이름', asked)}.yaml")
    eval_set = open_set(EvalSetConfig(source=source, classes=asked_classes, tasks=["zero_shot"]))
    assert sorted(eval_set.labels) == [0, 0, 1, 1]
    index = Collection.open(
        IndexConfig(model="m", images=str(tmp_path / form("사진첩", asked)), output_dir=str(tmp_path / "o"))
    )
    assert index.num_images == 4


@pytest.mark.parametrize("write", WRITERS)
def test_image_may_name_several_columns(tmp_path, records, write) -> None:
    """The first that a row has a value in; others may be nowhere."""
    source = write(tmp_path, records)
    if source.format == "annotations":
        return
    listed = replace(source, image=["nowhere", source.image, "other"])
    expected = [colour(row) for row in all_rows(open_source(source))]
    assert [colour(row) for row in all_rows(open_source(listed))] == expected
    with pytest.raises(SourceError, match=r"no column \['nowhere', 'other'\]"):
        open_source(replace(source, image=["nowhere", "other"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_may_have_their_images_in_different_columns(tmp_path, encoded, streaming) -> None:
    image = datasets.Image()
    shape = datasets.Features({"jpg": image, "png": image, "text": datasets.Value("string")})
    first, second = encoded((1, 0, 0)), encoded((2, 0, 0))
    cells = [(first, None, "가"), (None, second, "나"), (second, first, "다")]
    rows = [dict(zip(("jpg", "png", "text"), row, strict=True)) for row in cells]
    datasets.Dataset.from_list(rows, features=shape).to_parquet(tmp_path / "rows.parquet")
    common = {"path": str(tmp_path / "rows.parquet"), "captions": {"ko": "text"}, "streaming": streaming}
    assert [colour(row)[0] for row in all_rows(open_source(SourceConfig(**common, image=["jpg", "png"])))] == [1, 2, 2]
