"""Image folders: one order of rows, every picture used or listed, and no file lost to a guess at splits."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loading import batches, config
from sources_on_disk import all_rows, colour

from koclip.config import EvalSetConfig, SourceConfig
from koclip.data.formats.files import SourceError
from koclip.data.order import BatchPart
from koclip.data.sources import Row, open_source
from koclip.evaluation.sets import open_set

KINDS = ["csv", "jsonl", "parquet"]
Rows = Sequence[tuple[str, str]]


def write_metadata(folder: Path, kind: str, rows: Rows, column: str = "file_name") -> None:
    """Write names of pictures and their captions as a metadata file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, records = folder / f"metadata.{kind}", [{column: name, "text": text} for name, text in rows]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text("\n".join([f"{column},text", *map(",".join, rows)]) + "\n", encoding="utf-8")


@pytest.fixture
def picture(tmp_path, encoded) -> Callable[..., None]:
    """Return a function that writes pictures to `tmp_path`, each of a shade of its own."""
    shades = iter(range(1, 250))

    def write(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(encoded((next(shades), 0, 0)))

    return write


def opened(path: Path, **options) -> list[Row]:
    return all_rows(open_source(SourceConfig(**{"path": str(path), "captions": {"ko": "text"}, **options})))


def names_and_captions(rows: list[Row]) -> list[tuple[str, list[str]]]:
    return [(row.image.name, row.captions.get("ko", [])) for row in rows]


_PRINT_ORDERS = """
import sys
from koclip.config import SourceConfig
from koclip.data.sources import open_source
for path in sys.argv[1:]:
    source = open_source(SourceConfig(path=path, captions={"ko": "text"}))
    stream = open_source(SourceConfig(path=path, captions={"ko": "text"}, streaming=True))
    for rows in (source.iter_rows(images=False), stream.iter_rows(images=False)):
        print("order:", *(row.captions["ko"][0] for row in rows))
"""


def test_several_metadata_files_have_one_order(tmp_path, picture) -> None:
    """Python orders a set of paths anew in every process."""
    for kind in KINDS:
        for folder in ("b", "a", "다", "c"):
            names = [f"{number}.png" for number in range(3)]
            picture(*(f"{kind}/{folder}/{name}" for name in names))
            write_metadata(tmp_path / kind / folder, kind, [(name, f"{folder}{name}") for name in names])
    expected = " ".join(
        ["order:", *(f"{folder}{number}.png" for folder in ("a", "b", "c", "다") for number in range(3))]
    )
    command = [sys.executable, "-c", _PRINT_ORDERS, *(str(tmp_path / kind) for kind in KINDS)]
    settings = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "1", "PYTHONUTF8": "1"}
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    assert [line for line in ran.stdout.splitlines() if line.startswith("order:")] == [expected] * 6


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_rows_without_each_other_are_listed(tmp_path, picture, kind, streaming) -> None:
    picture("a.png", "b.png", "sub/c.png", "lone.png", "sub/lone.JPG", "suffixless")
    write_metadata(tmp_path, kind, [("a.png", "가"), ("gone.png", "나"), ("./sub/../b.png", "다"), ("sub/c.png", "라")])
    source = SourceConfig(path=str(tmp_path), captions={"ko": "text"}, streaming=streaming)
    rows = all_rows(open_source(source))
    assert [row.captions.get("ko") for row in rows] == [["가"], ["나"], ["다"], ["라"], None, None, None]
    assert {row.image.name for row in rows if not row.captions} == {"lone.png", "lone.JPG", "suffixless"}
    eval_set = open_set(EvalSetConfig(source=source, max_skipped_fraction=0.9))
    assert len(eval_set.images) == 3
    assert len(eval_set.skipped) == 4
    assert {skip.key.rsplit("/", 1)[1] for skip in eval_set.skipped} == {
        "gone.png",
        "lone.png",
        "lone.JPG",
        "suffixless",
    }


def test_training_lists_them_too(tmp_path, picture, tokenizer) -> None:
    names = [f"{number}.png" for number in range(8)]
    picture(*names)
    write_metadata(tmp_path, "csv", [(name, f"{name} 사진") for name in [*names[:7], "gone.png"]])
    source = SourceConfig(path=str(tmp_path), captions={"ko": "text"})
    drawn = batches(config(source), tokenizer, 9, BatchPart(1))
    used = {key.rsplit("/", 1)[1] for batch in drawn for key in batch.keys}
    left = {skip.key.rsplit("/", 1)[1] for batch in drawn for skip in batch.skipped}
    assert used == set(names[:7])
    assert left == {"7.png", "gone.png"}


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_the_metadata_have_any_form(tmp_path, picture, kind) -> None:
    picture(*(unicodedata.normalize("NFD", name) for name in ("사진/고양이.png", "사진/개[1].png")))
    write_metadata(tmp_path / unicodedata.normalize("NFD", "사진"), kind, [("고양이.png", "가"), ("개[1].png", "나")])
    rows = opened(tmp_path)
    assert [(colour(row)[0], row.captions["ko"]) for row in rows] == [(1, ["가"]), (2, ["나"])]


def test_cells_of_metadata_stay_text(tmp_path, picture) -> None:
    """pandas makes 1 of 001 and nothing of NA."""
    picture("a.png", "b.png", "c.png")
    lines = ["file_name,kind,text", "a.png,001,NA", "b.png,002,2024-01-01", 'c.png,002,"[""하나"", ""둘""]"']
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = opened(tmp_path, label="kind")
    assert [(row.label, row.captions) for row in rows] == [
        ("001", {"ko": ["NA"]}),
        ("002", {"ko": ["2024-01-01"]}),
        ("002", {"ko": ["하나", "둘"]}),
    ]


def test_metadata_in_another_encoding(tmp_path, picture) -> None:
    picture("고양이.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n고양이.png,고양이 사진\n".encode("cp949"))
    assert names_and_captions(opened(tmp_path, encoding="cp949")) == [("고양이.png", ["고양이 사진"])]
    with pytest.raises(SourceError, match=r"metadata\.csv.*cp949"):
        opened(tmp_path)


def test_other_columns_of_pictures(tmp_path, picture) -> None:
    picture("a.png", "b.png")
    write_metadata(tmp_path, "csv", [("a.png", "가")], column="left_file_name")
    assert names_and_captions(opened(tmp_path, image="left")) == [("a.png", ["가"]), ("b.png", [])]
    for image in ("image", "right"):
        with pytest.raises(SourceError, match=rf"\['{image}'\].*'left_file_name'"):
            opened(tmp_path, image=image)


def classes(rows: list[Row]) -> set[tuple[str, str | None]]:
    return {(row.image.name, row.label) for row in rows}


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_classes(tmp_path, picture, streaming) -> None:
    picture("고양이/1.png", "고양이/2.HEIC", "개/3.jpeg", "개/4", "cover")
    for name in ("LICENSE", "개/README", "개/notes.txt"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "개" / ".hidden.png").write_bytes(b"")
    rows = opened(tmp_path, label="label", captions={}, streaming=streaming)
    expected = {("1.png", "고양이"), ("2.HEIC", "고양이"), ("3.jpeg", "개"), ("4", "개"), ("cover", None)}
    assert classes(rows) == expected
    assert len(rows) == 5


@pytest.mark.parametrize("names", [["a/1.png", "a/2.png"], ["a/1.png", "b/c/2.png"], ["1.png", "a/2.png"]])
def test_folders_that_are_no_classes(tmp_path, picture, names) -> None:
    picture(*names)
    with pytest.raises(SourceError, match=r"\['label'\].*\['image'\]"):
        opened(tmp_path, label="label", captions={})


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.png", "test/b.png"], {"train": {"a.png"}, "test": {"b.png"}, "all": {"a.png", "b.png"}}),
        (["x/val/a.png", "x/train/b.png"], {"validation": {"a.png"}, "train": {"b.png"}}),
        (["train_1.png", "test-2.png"], {"train": {"train_1.png"}, "test": {"test-2.png"}}),
        (["a.png", "b.png"], {"train": {"a.png", "b.png"}, "test": None}),
        (["airplane/a.png", "train/b.png"], {"train": None, "all": {"a.png", "b.png"}}),  # a class, of CIFAR's kind
        (["a.png", "eval_1.png"], {"train": None, "test": None, "all": {"a.png", "eval_1.png"}}),
        (["train/val/a.png", "train/b.png"], {"train": None}),
    ],
)
def test_no_picture_is_lost_to_the_names_of_splits(tmp_path, picture, names, splits) -> None:
    """`datasets` takes what looks like the name of a split for one, and leaves all other files out."""
    picture(*names)
    (tmp_path / "LICENSE").write_text("no picture")
    for split, expected in splits.items():
        if expected is None:
            with pytest.raises(SourceError, match="split"):
                opened(tmp_path, split=split, captions={}, label="label")
            continue
        rows = all_rows(open_source(SourceConfig(path=str(tmp_path), split=split, captions={"ko": "image"})))
        assert {row.image.name for row in rows} == expected


def test_a_folder_without_a_picture_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(SourceError, match=tmp_path.name):
        opened(tmp_path, format="image_folder")


def test_a_part_of_a_split(tmp_path, picture) -> None:
    names = [f"{number}.png" for number in range(5)]
    picture(*names)
    write_metadata(tmp_path, "jsonl", [(name, name) for name in names])
    assert [name for name, _ in names_and_captions(opened(tmp_path, split="train[1:3]"))] == names[1:3]
