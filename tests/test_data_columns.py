"""koclip.data.sources and tables: cells that hold no caption, rows left out, and every mistake as one clear line."""

import itertools
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_on_disk import (
    CAPTIONS,
    COLOURS,
    all_rows,
    colour,
    csv_file,
    hub,
    image_folder,
    nested_parquet,
    parquet,
    parquet_of_bytes,
    webdataset,
)

from koclip.config import ConfigError, SourceConfig
from koclip.data.formats.files import SourceError
from koclip.data.sources import open_source

CELLS = ["고양이", "", None, "  ", "nan", ["개", None, 3, ""], 3, 2.5, {"a": "b"}, [], ["NaN"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_cells_give_no_caption(tmp_path, streaming) -> None:
    lines = [json.dumps({"image": "a.png", "text": cell}) for cell in CELLS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = SourceConfig(path=str(tmp_path / "rows.jsonl"), captions={"ko": "text"}, streaming=streaming)
    captions = [row.captions for row in all_rows(open_source(config))]
    assert captions == [{"ko": ["고양이"]}, {}, {}, {}, {}, {"ko": ["개", "", "", ""]}, {}, {}, {}, {}, {}]


def test_missing_csv_cells_give_no_caption(tmp_path) -> None:
    (tmp_path / "rows.csv").write_text("image,text\na.png,고양이\nb.png,\nc.png,nan\nd.png,NaN\n", encoding="utf-8")
    rows = all_rows(open_source(SourceConfig(path=str(tmp_path / "rows.csv"), captions={"ko": "text"})))
    assert [row.captions for row in rows] == [{"ko": ["고양이"]}, {}, {}, {}]


@pytest.mark.parametrize("streaming", [False, True])
def test_quotes_are_text_in_tab_separated_files(tmp_path, streaming) -> None:
    texts = ['"고양이', '개 "멍멍"', '가"나', '"새"']
    lines = ["image\ttext", *(f"{place}.png\t{text}" for place, text in enumerate(texts))]
    (tmp_path / "rows.tsv").write_text("\n".join(lines), encoding="utf-8")
    rows = all_rows(
        open_source(SourceConfig(path=str(tmp_path / "rows.tsv"), captions={"ko": "text"}, streaming=streaming))
    )
    assert [row.captions for row in rows] == [{"ko": [text]} for text in texts]


@pytest.mark.parametrize("streaming", [False, True])
def test_where_keeps_rows_by_value_and_their_stored_numbers(tmp_path, records, streaming) -> None:
    rows = [{**record, "id": n, "meta": {"vendor": "ab"[n % 2]}} for n, record in enumerate(records)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    common = {"path": str(tmp_path / "rows.parquet"), "captions": CAPTIONS, "streaming": streaming}
    kept = all_rows(open_source(SourceConfig(**common, where={"meta.vendor": ["a"], "id": ["1", "2"]})))
    assert [colour(row) for row in kept] == [COLOURS["파랑"]]
    assert kept[0].key.endswith("/2/2")  # number and id
    if not streaming:
        with pytest.raises(SourceError, match=r"where: {'id': \['9'\]}"):
            open_source(SourceConfig(**common, where={"id": ["9"]}))


@pytest.mark.parametrize("streaming", [False, True])
def test_ranges_of_images_split_the_rows_and_keep_copies_together(tmp_path, encoded, streaming) -> None:
    """Every row is in exactly one range; a picture that is missing is in all, so that its reader lists it."""
    pictures: list[bytes | None] = [encoded((12 * number, 90, 30)) for number in range(20)]
    rows = [{"image": picture, "id": number, "text": "고양이"} for number, picture in enumerate([*pictures * 2, None])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    common = {"path": str(tmp_path / "rows.parquet"), "captions": {"ko": "text"}, "streaming": streaming}
    parts = []
    for part in ([0.0, 0.25], [0.25, 0.5], [0.5, 1.0]):
        numbers = [
            int(row.key.rpartition("/")[2]) for row in all_rows(open_source(SourceConfig(**common, image_range=part)))
        ]
        assert numbers[-1] == 40
        assert 0 < len(numbers) < 41
        parts.append(numbers[:-1])
    assert all(
        {number % 20 for number in numbers} == {number for number in numbers if number < 20} for numbers in parts
    )
    assert sorted(itertools.chain(*parts)) == list(range(40))


@pytest.mark.parametrize("setting", [{"where": {"kind": ["x"]}}, {"image_range": [0.0, 0.5]}])
def test_a_format_that_cannot_select_rows_refuses_to(setting) -> None:
    with pytest.raises(SourceError, match=next(iter(setting))):
        open_source(SourceConfig(**setting))


@pytest.mark.parametrize("write", [parquet, parquet_of_bytes, nested_parquet, csv_file, webdataset, image_folder, hub])
@pytest.mark.parametrize("wrong", [{"image": "picture"}, {"captions": {"ko": "caption"}}, {"where": {"kind": ["x"]}}])
def test_a_missing_column_is_named_with_those_that_exist(write, wrong, tmp_path, records) -> None:
    config = replace(write(tmp_path, records), **wrong)
    with pytest.raises(SourceError, match=r"column \['(picture|caption|kind)'\].*\[.*\]") as caught:
        open_source(config)
    assert "\n" not in str(caught.value)


def test_missing_nested_columns_are_noticed(tmp_path, records) -> None:
    config = nested_parquet(tmp_path, records)
    with pytest.raises(SourceError, match=r"no column \['sample.told.en'\]; .*'sample.image', 'sample.told.ko'\]"):
        open_source(SourceConfig(path=config.path, image="sample.image", captions={"en": "sample.told.en"}))


def test_what_cannot_be_opened_is_one_clear_line(tmp_path, records) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "bad.json").write_text('{"image": ')
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    good = parquet(tmp_path, records).path
    cases = [
        (SourceConfig(path=str(tmp_path / "gone.parquet")), "matches no file"),
        (SourceConfig(path=str(tmp_path / "gone"), format="image_folder"), "is not a folder"),
        (SourceConfig(path="nobody/nothing"), "cannot be read as hub"),
        (SourceConfig(path="typo.jpg.d"), "cannot be read as hub"),
        (SourceConfig(path=good, captions=CAPTIONS, split="train[5:2:1]"), "cannot be read as parquet, split"),
        *(
            (SourceConfig(path=str(tmp_path / f"bad.{kind}")), "cannot be read as")
            for kind in ("parquet", "json", "tar")
        ),
        (SourceConfig(path=str(tmp_path / "empty.csv")), "cannot be read as csv"),
        (SourceConfig(captions={"ja": "captions_ja"}), r"'scenes': .*\['ja'\]"),
    ]
    for config, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_source(config)
        assert "\n" not in str(caught.value)


def test_bad_source_configs_name_the_key() -> None:
    for options, key in [
        ({"captions": {}}, "captions"),
        ({"languages": {"ja": 1.0}}, "languages"),
        ({"languages": {"ko": -1.0, "en": 2.0}}, "languages.ko"),
        ({"languages": {"ko": 0.0, "en": 0.0}}, "languages"),
        ({"weight": 0.0}, "weight"),
        ({"scenes_size": 3}, "scenes_size"),
    ]:
        with pytest.raises(ConfigError, match=rf"^data\.sources\[\]\.{key}: got"):
            SourceConfig(**options)
