"""Text files and encodings: cells stay what is written, in any encoding; what cannot be read is named."""

import csv
import dataclasses
import gzip
import io
import json
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources_on_disk import all_rows

from koclip.config import ConfigError, DataConfig, IndexConfig, SourceConfig
from koclip.data.formats.files import SourceError
from koclip.data.loader import training_captions
from koclip.data.sources import StreamSource, open_source
from koclip.search.build import Collection

KOREAN = "image,ko\na.png,빨간 사과\nb.png,똠양꿍 펲시 고양이\n"
streaming_or_not = pytest.mark.parametrize("streaming", [False, True])


def source(path: Path, encoding: str = "utf-8", **options) -> SourceConfig:
    options |= {} if encoding == "utf-8" else {"encoding": encoding}
    return SourceConfig(path=str(path), **{"captions": {"ko": "ko"}, **options})


def captions(config: SourceConfig) -> list[dict[str, list[str]]]:
    return [row.captions for row in all_rows(open_source(config))]


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


# What people write in labels, ids, captions and file names, and pandas or Arrow make something else of.
WORDS = [
    *("0001", "7", "1e5", "1.0", "NA", "N/A", "n/a", "NULL", "#N/A", "-nan", "True", "2020-01-01", "20200101"),
    *("2020-01-01T10:00:00", "inf", "0x10", "1_000", "1,000", " 7 ", "+82", "가", "00:01", "9" * 30),
]


@streaming_or_not
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_cells_stay_text(tmp_path, streaming, suffix) -> None:
    rows = [{"id": word, "image": f"{word}.jpg", "label": word, "ko": word} for word in WORDS]
    if suffix in ("csv", "tsv"):
        with (tmp_path / f"rows.{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        write(tmp_path, f"rows.{suffix}", text)
    read = all_rows(open_source(source(tmp_path / f"rows.{suffix}", label="label", streaming=streaming)))
    assert [row.label for row in read] == WORDS
    assert [row.captions.get("ko") for row in read] == [[word.strip()] if word != "NULL" else None for word in WORDS]
    assert [str(row.image.relative_to(tmp_path)) for row in read] == [f"{word}.jpg" for word in WORDS]
    for word in ("0001", "7", "NA", "2020-01-01"):
        config = source(tmp_path / f"rows.{suffix}", where={"id": [word]}, streaming=streaming)
        assert captions(config) == [{"ko": [word]}]


def test_numbers_of_json_are_labels_but_no_captions(tmp_path) -> None:
    rows = [{"image": "a.png", "label": 3, "ko": 3}, {"image": "b.png", "label": 3.0, "ko": ["개", 3]}]
    rows += [{"image": "c.png", "label": "03", "ko": None}, {"image": "d.png", "label": True, "ko": "7"}]
    config = source(write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows))), label="label")
    read = all_rows(open_source(config))
    assert [row.label for row in read] == ["3", "3", "03", "True"]
    assert [[text for texts in row.captions.values() for text in texts if text] for row in read] == [
        [],
        ["개"],
        [],
        ["7"],
    ]


def test_what_programs_write_for_no_value_is_no_caption_but_a_label(tmp_path) -> None:
    words = ["nan", "NaN", "None", "null", "<NA>", ""]
    text = "image,label,ko\n" + "".join(f"{n}.png,{word},{word}\n" for n, word in enumerate(words))
    read = all_rows(open_source(source(write(tmp_path, "rows.csv", text), label="label")))
    assert [row.captions for row in read] == [{}] * len(words)
    assert [row.label for row in read] == words


@streaming_or_not
@pytest.mark.parametrize(
    ("encoding", "setting"),
    [
        *(("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-8"), ("utf-32", "utf-8")),
        *(("utf-8-sig", "cp949"), ("cp949", "cp949"), ("johab", "johab"), ("utf-16-le", "utf-16-le")),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "tar"])
def test_any_encoding_is_read(tmp_path, encoding, setting, suffix, streaming) -> None:
    texts = ["빨간 사과", "고양이 두 마리"]
    if suffix == "tar":
        write_tar(tmp_path / "rows.tar", [{"png": b"", "txt": text.encode(encoding)} for text in texts])
        config = source(tmp_path / "rows.tar", image="png", captions={"ko": "txt"}, encoding=setting)
    else:
        separator = {"csv": ",", "tsv": "\t"}.get(suffix)
        rows = [{"image": f"{n}.png", "ko": text} for n, text in enumerate(texts)]
        table = "\r\n".join(["image,ko", *(f"{row['image']},{row['ko']}" for row in rows)])
        objects = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = table.replace(",", separator) if separator else "\n".join(objects)
        text = f"[{', '.join(objects)}]" if suffix == "json" else text
        config = source(write(tmp_path, f"rows.{suffix}", text, encoding), encoding=setting, streaming=streaming)
    assert captions(config) == [{"ko": [text]} for text in texts]


SHORT = ["고양이", "빨간 사과", "강아지가 뛴다", "바다", "자전거를 탄 아이", "꽃병"]


@pytest.mark.parametrize("encoding", ["cp949", "euc_kr", "johab", "utf-16-le", "utf-16-be", "latin-1", "shift_jis"])
def test_the_likely_encoding_of_a_short_file_is_named(tmp_path, encoding) -> None:
    texts = {"latin-1": ["Männer am Strand", "un garçon", "niño", "à côté"], "shift_jis": ["猫がいる", "赤い花"]}
    likely = {"euc_kr": "cp949", "latin-1": "cp1252"}.get(encoding, encoding)
    for text in texts.get(encoding, SHORT):
        path = write(tmp_path, "pairs.csv", f"image,ko\na.png,x\nb.png,{text}\n", encoding)
        with pytest.raises(SourceError, match=rf"pairs\.csv.* utf-8.*encoding: {likely} ") as caught:
            open_source(source(path))
        assert encoding.startswith("utf-16") or "pairs.csv, line 3, is" in str(caught.value)
        captions(source(path, encoding=likely))


@given(st.lists(st.sampled_from(SHORT), min_size=2, max_size=6), st.sampled_from(["cp949", "johab", "utf-16-le"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_likely_encoding_is_right_for_any_captions(tmp_path, texts, encoding) -> None:
    path = write(tmp_path, "pairs.csv", "image,ko\n" + "".join(f"a.png,{text}\n" for text in texts), encoding)
    with pytest.raises(SourceError, match=rf"encoding: {encoding} "):
        open_source(source(path, streaming=True))


@pytest.mark.parametrize("setting", ["cp949", "euc_kr", "latin-1", "gb18030"])
def test_utf_8_is_not_read_as_something_else(tmp_path, setting) -> None:
    for text in (KOREAN, "image,ko\na.png,고양이\n"):
        with pytest.raises(SourceError, match=r"pairs\.csv"):
            open_source(source(write(tmp_path, "pairs.csv", text), encoding=setting))


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def one_bad(folder: Path, kind: str) -> SourceConfig:
    """Write 30 rows of which the 20th alone is in cp949."""
    texts = [f"고양이 {n}".encode("cp949" if n == 19 else "utf-8") for n in range(30)]
    if kind == "csv":
        data = b"image,ko\n" + b"".join(b"%d.png,%s\n" % (n, text) for n, text in enumerate(texts))
    elif kind in ("jsonl", "json"):
        lines = [b'{"image": "%d.png", "ko": "%s"}' % (n, text) for n, text in enumerate(texts)]
        data = b"\n".join(lines) if kind == "jsonl" else b"[" + b",\n".join(lines) + b"]"
    else:
        cells = [text if kind == "txt" else b'{"ko": "%s"}' % text for text in texts]
        path = write_tar(folder / "shard.tar", [{"jpg": b"", kind[-4:]: cell} for cell in cells])
        return source(path, image="jpg", captions={"ko": "txt" if kind == "txt" else "json.ko"})
    (folder / f"rows.{kind}").write_bytes(data)
    return source(folder / f"rows.{kind}")


READERS = {
    "rows": lambda config: all_rows(open_source(config)),
    "captions": lambda config: list(training_captions(DataConfig(sources=[config]))),
    "index": lambda config: list(Collection.open(IndexConfig(model="m", source=config)).shards()),
}


@pytest.mark.parametrize("reader", READERS)
@streaming_or_not
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "txt", "tar.json"])
def test_one_caption_in_another_encoding_is_refused_with_its_place(tmp_path, kind, streaming, reader) -> None:
    config = dataclasses.replace(one_bad(tmp_path, kind), streaming=streaming)
    place = {"csv": "line 21,", "jsonl": "line 20,", "json": "line 20,"}.get(kind, "sample '00019'")
    with pytest.raises(SourceError, match=rf"{Path(config.path).name}, {place}.*utf-8.* cp949"):
        READERS[reader](config)


def test_a_stream_that_breaks_later_names_the_file_and_the_row(tmp_path) -> None:
    """The rows that tell the columns are read when it is opened; this is behind them."""
    lines = [json.dumps({"image": "a.png", "ko": "고양이" * 200}, ensure_ascii=False) for n in range(3_000)]
    data = "\n".join(lines).encode() + b"\n" + '{"image": "a.png", "ko": "개"}'.encode("cp949")
    (tmp_path / "rows.jsonl").write_bytes(data)
    stream = open_source(source(tmp_path / "rows.jsonl", streaming=True))
    assert isinstance(stream, StreamSource)
    for read in (stream.iter_rows, lambda: stream.iter_rows(images=False), lambda: stream.rows(0, 0, 10, 0, 1)):
        with pytest.raises(SourceError, match=r"rows\.jsonl, line 3001, .*utf-8"):
            list(read())


@pytest.mark.parametrize("format", ["parquet", "arrow", "scenes", "hub"])
def test_formats_without_an_encoding_refuse_one(tmp_path, format) -> None:
    with pytest.raises(SourceError, match=r"data\.sources\[\]\.encoding: got 'cp949'"):
        open_source(source(tmp_path, format=format, encoding="cp949"))


def test_metadata_of_an_image_folder(tmp_path, encoded) -> None:
    (tmp_path / "0001.png").write_bytes(encoded())
    write(tmp_path, "metadata.csv", "file_name,label,ko\n0001.png,007,고양이\n", "cp949")
    (row,) = all_rows(open_source(source(tmp_path, "cp949", label="label")))
    assert (row.label, row.captions) == ("007", {"ko": ["고양이"]})
    with pytest.raises(SourceError, match=r"metadata\.csv, line 2, .*utf-8.* encoding: cp949"):
        open_source(source(tmp_path, label="label"))


@pytest.mark.parametrize("encoding", ["cp950000", "base64", "hex", ""])
def test_what_is_no_encoding_is_refused(encoding) -> None:
    with pytest.raises(ConfigError, match=r"^data\.sources\[\]\.encoding: got"):
        SourceConfig(encoding=encoding)


BROKEN = {
    "more fields": ("rows.csv", "image,ko\na.png,개, 고양이\n", r"line 2: 3 fields, expected 2"),
    "more fields in every line": ("rows.csv", "image,ko\na.png,개,\nb.png,새,\n", r"line 2: 3 fields, expected 2"),
    "a line break in a caption": ("rows.csv", "image,en,ko\na.png,a,개\nb.png,b\nc,새\n", "line 3: 2 fields"),
    "a quote that is not closed": ("rows.csv", 'image,ko\na.png,개\nb.png,"새\nc.png,말\n', "line 3: "),
    "a column twice": ("rows.csv", "image,ko,ko\na.png,개,새\n", "column 'ko' twice"),
    "nothing": ("rows.csv", "", "is empty"),
    "no object": ("rows.jsonl", '{"image": "a.png", "ko": "개"}\n3\n', "line 2: got 3, expected"),
    "no JSON": ("rows.jsonl", '{"image": "a.png", "ko": "개"}\n{"image": "b.png", "ko": 새}\n', "line 2 is not JSON"),
    "half a file": ("rows.json", '[{"image": "a.png", "ko": "개"}, {"im', "is not JSON"),
    "a list in a list": ("rows.json", '[["a.png", "개"]]', "item 1: got "),
}


@streaming_or_not
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_the_line(tmp_path, name, streaming) -> None:
    file, text, message = BROKEN[name]
    with pytest.raises(SourceError, match=rf"cannot be read as \w+, split 'train': .*{file}.*{message}") as caught:
        open_source(source(write(tmp_path, file, text), streaming=streaming))
    assert "\n" not in str(caught.value)


def test_many_rows_are_all_read(tmp_path) -> None:
    texts = [f"고양이 {n}" for n in range(25_000)]
    path = write(tmp_path, "rows.csv", "image,ko\n" + "".join(f"a.png,{text}\n" for text in texts))
    read = open_source(source(path))
    assert read.captions(range(len(read))) == [{"ko": [text]} for text in texts]


@streaming_or_not
def test_columns_may_be_missing_in_some_rows_but_not_in_all(tmp_path, streaming) -> None:
    rows = [{"image": "a.png"}, {"image": "b.png", "ko": "개", "meta": [{"en": "a dog"}]}, {}]
    path = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    config = source(path, captions={"ko": "ko", "en": "meta.en"}, streaming=streaming)
    assert captions(config) == [{}, {"ko": ["개"], "en": ["a dog"]}, {}]
    with pytest.raises(SourceError, match=r"\['meta\.ko'\].*\['image', 'ko', 'meta\.en'\]"):
        open_source(source(path, captions={"ko": "meta.ko"}, streaming=streaming))


@streaming_or_not
def test_each_file_has_its_own_header_and_slices_count_all_rows(tmp_path, streaming) -> None:
    write(tmp_path, "a.csv", "image,ko\na.png,개\n\nb.png,새\n")
    write(tmp_path, "b.csv", 'ko,image\r\n"말,\n소",c.png\r\n')
    config = source(tmp_path / "*.csv", streaming=streaming)
    assert captions(config) == [{"ko": ["개"]}, {"ko": ["새"]}, {"ko": ["말, 소"]}]
    sliced = dataclasses.replace(config, split="train[1:]")
    if streaming:
        with pytest.raises(SourceError, match="streaming: false"):
            open_source(sliced)
    else:
        assert captions(sliced) == [{"ko": ["새"]}, {"ko": ["말, 소"]}]


def test_files_without_a_header_and_packed_ones(tmp_path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress("a.png,0001\n".encode("cp949")))
    config = source(tmp_path / "rows.csv.gz", columns=["image", "ko"], encoding="cp949")
    assert captions(config) == [{"ko": ["0001"]}]


cells = st.one_of(
    st.none(),
    st.integers(),
    st.booleans(),
    st.text(),
    st.lists(st.one_of(st.none(), st.text())),
    st.sampled_from(WORDS),
)


@given(st.lists(st.fixed_dictionaries({"image": st.text(min_size=1), "label": cells}), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_says_what_it_says_whatever_stands_beside_it(tmp_path, rows) -> None:
    """Values of any kind in one column, lone surrogates too, from the array and from lines, streamed and not."""
    expected = [None if row["label"] is None else str(row["label"]) for row in rows]
    for name, text in (("rows.json", json.dumps(rows)), ("rows.jsonl", "\n".join(map(json.dumps, rows)))):
        path = write(tmp_path, name, text)
        for streaming in (False, True):
            config = source(path, captions={}, label="label", streaming=streaming)
            labels = [row.label for row in all_rows(open_source(config))]
            assert [label and label.strip() for label in labels] == [label and nfc(label).strip() for label in expected]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
