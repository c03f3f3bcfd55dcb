"""koclip.data.sources and tables: every kind of source gives the same rows."""

from dataclasses import replace

import datasets
import pytest
from sources_on_disk import (
    CAPTIONS,
    COLOURS,
    EXPECTED,
    TOY_FORMAT,
    WRITERS,
    all_rows,
    annotations,
    colour,
    csv_file,
    features,
    json_lines,
    nested_parquet,
    parquet,
    tsv_file,
    webdataset,
    write_images,
)

from koclip.config import SourceConfig
from koclip.data import formats
from koclip.data.formats import dig
from koclip.data.sources import SourceError, StreamSource, open_source
from koclip.data.transforms import decode


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_gives_the_same_rows(write, streaming, tmp_path, records) -> None:
    config = write(tmp_path, records)
    config = replace(config, streaming=streaming)
    source = open_source(config)
    assert isinstance(source, StreamSource) == (streaming or write is webdataset)
    expected = EXPECTED
    if write in (csv_file, tsv_file):
        expected = [(colour, {**captions, "ko": captions["ko"][:1]}) for colour, captions in expected]
    if write is annotations:
        expected = [(colour, {"ko": captions["ko"]}) for colour, captions in expected]
    rows = all_rows(source)
    assert [(colour(row), row.captions) for row in rows] == expected
    assert len({row.key for row in rows}) == 3
    captions = [row.captions for row in source.iter_rows(images=False)]
    assert list(captions) == [captions for _, captions in expected]


def test_rows_are_read_in_the_order_asked_for(tmp_path, records) -> None:
    source = open_source(parquet(tmp_path, records))
    assert [colour(row) for row in source.rows([2, 0, 2])] == [EXPECTED[2][0], EXPECTED[0][0], EXPECTED[2][0]]
    assert source.captions([1]) == [EXPECTED[1][1]]


def test_hub_data_sets_are_asked_for_by_id_subset_split_and_revision(monkeypatch, records) -> None:
    asked = {}

    def load_dataset(*args, **options):
        asked.update(args=args, **options)
        table = datasets.Dataset.from_list(records, features=features())
        return table.to_iterable_dataset() if options["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in (False, True):
        config = SourceConfig(
            path="owner/name", subset="ko", split="val", revision="abc", streaming=streaming, captions=CAPTIONS
        )
        assert [colour(row) for row in all_rows(open_source(config))] == list(COLOURS.values())
        assert asked == {"args": ("owner/name", "ko"), "split": "val", "revision": "abc", "streaming": streaming}


def test_remote_files_are_handed_on(monkeypatch, records) -> None:
    asked = {}

    def load_dataset(builder, **options):
        asked.update(builder=builder, **options)
        return datasets.Dataset.from_list(records, features=features()).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    open_source(SourceConfig(path="s3://bucket/part-?.parquet", captions=CAPTIONS))
    assert asked["builder"] == "parquet"
    assert asked["data_files"] == {"train": ["s3://bucket/part-?.parquet"]}


def test_images_stay_encoded_whatever_they_hold(tmp_path, records) -> None:
    records[1]["image"] = b"not an image"
    for write in (parquet, nested_parquet, webdataset):
        folder = tmp_path / write.__name__
        folder.mkdir()
        rows = all_rows(open_source(write(folder, records)))
        assert [row.image for row in rows] == [record["image"] for record in records]


def test_other_columns_are_not_read(tmp_path, records) -> None:
    shape = datasets.Features({**features(), "other": datasets.Image()})
    table = datasets.Dataset.from_list([{**record, "other": b"broken"} for record in records], features=shape)
    table.to_parquet(tmp_path / "rows.parquet")
    assert len(all_rows(open_source(SourceConfig(path=str(tmp_path / "rows.parquet"), captions=CAPTIONS)))) == 3


def test_keys_find_a_row_again(tmp_path, records) -> None:
    config = webdataset(tmp_path, records)
    keys = [row.key for row in all_rows(open_source(config))]
    assert keys == [f"{config.key}/shard-00{n}.tar/0/0000{n}" for n in range(3)]
    assert config.key.startswith("shard-all~")
    config = json_lines(tmp_path, records)
    keys = [row.key for row in all_rows(open_source(config))]
    assert keys == [f"{config.key}/{n}/{n}.png" for n in range(3)]


def test_local_files_take_any_split_name_and_slices(tmp_path, records) -> None:
    path = parquet(tmp_path, records).path
    assert len(open_source(SourceConfig(path=path, captions=CAPTIONS, split="val"))) == 3
    assert len(open_source(SourceConfig(path=path, captions=CAPTIONS, split="train[:2]"))) == 2


def test_dig() -> None:
    record = {"a": {"b": [{"c": 1}, {"c": 2}, {}]}, "x.y": 3, "x": {"z.w": 4}}
    assert dig(record, "a.b.c") == [1, 2, None]
    assert dig(record, "x.y") == 3
    assert dig(record, "x.z.w") == 4
    assert dig(record, "a.q") is None
    assert dig(record, "q.a") is None


def test_scenes_are_a_source() -> None:
    source = open_source(SourceConfig(scenes_size=6), seed=3)
    rows = source.rows(range(6))
    assert len(source) == 6
    assert source.captions(range(6)) == [row.captions for row in rows]
    assert all(row.image.shape == (48, 48, 3) for row in rows)
    assert open_source(SourceConfig(scenes_size=6), seed=4).rows([0])[0].captions is not None
    only = open_source(SourceConfig(captions={"en": "en"})).captions([0])[0]
    assert list(only) == ["en"]


def test_shared_flickr(shared_data) -> None:
    captions = {"ko": "captions_ko", "en": "captions_en"}
    source = open_source(SourceConfig(path=str(shared_data / "flickr8k_ko" / "val.parquet"), captions=captions))
    assert len(source) == 1_000
    first = source.rows([0])[0]
    assert {language: len(texts) for language, texts in first.captions.items()} == {"ko": 5, "en": 5}
    assert decode(first.image, 10**8).shape == (3, 128, 128)


@pytest.fixture
def toy_format(tmp_path, monkeypatch):
    """A new format: one file among the others."""
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "toy_lines.py").write_text(TOY_FORMAT)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    for cached in (formats.formats, formats.formats_by_suffix):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (formats.formats, formats.formats_by_suffix):
        cached.cache_clear()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_new_format_is_one_file(toy_format, tmp_path, records, streaming) -> None:
    rows = write_images(tmp_path / "pictures", records)
    lines = "".join(f"{row['image']}|{row['caption_en']}\n" for row in rows)
    (tmp_path / "rows.toy").write_text(lines, encoding="utf-8")
    config = SourceConfig(path=str(tmp_path / "rows.toy"), captions={"en": "text"}, streaming=streaming)
    read = all_rows(open_source(config))
    assert [colour(row) for row in read] == list(COLOURS.values())
    assert [row.captions for row in read] == [{"en": [row["caption_en"]]} for row in rows]
    with pytest.raises(SourceError, match=r"data\.sources\[\]\.format: .*'csv'.*'toy'"):
        open_source(SourceConfig(path="rows.tox", format="tox"))
