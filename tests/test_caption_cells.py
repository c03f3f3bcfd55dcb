"""Captions as their files have them: lists that became text, HTML entities, and JSON of other layouts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources_on_disk import all_rows
from test_text_files import source as text_source
from test_text_files import write_tar

from koclip.config import SourceConfig
from koclip.data.formats.files import SourceError
from koclip.data.sources import open_source
from koclip.text.normalize import clean_captions, normalize


def source(path: Path, **options) -> SourceConfig:
    return text_source(path, **{"captions": {"ko": "captions"}, **options})


def read(config: SourceConfig) -> list[list[str]]:
    return [[text for text in row.captions.get("ko", []) if text] for row in all_rows(open_source(config))]


LISTS = [["개", "고양이"], ["하나"], ["it's", 'a "dog"', "a, b"], ["긴 " * 40, "b\nc"], ["[속보] 개", "\\n"], ["😀"]]
TEXTS = [
    "[속보] 개가 짖는다",
    "[개]",
    "[개, 고양이]",
    "[1]",
    "[2024, 2025]",
    "['개'",
    "['개'] 와 '새'",
    "[",
    "['a''b']",
    "['a', 3]",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [str, json.dumps, lambda items: json.dumps(items, ensure_ascii=False), np.array])
def test_lists_in_cells_are_read_as_lists(tmp_path, form, streaming) -> None:
    """As pandas writes lists, as somebody encodes them, and as pandas writes the arrays that it reads from Parquet."""
    cells = [*map(form, LISTS), *TEXTS]
    names = [f"{n}.png" for n in range(len(cells))]
    pd.DataFrame({"image": names, "captions": cells}).to_csv(tmp_path / "rows.csv", index=False)
    expected = [[normalize(text) for text in cell] for cell in [*LISTS, *([text] for text in TEXTS)]]
    assert read(source(tmp_path / "rows.csv", streaming=streaming)) == expected


@pytest.mark.parametrize(
    "cell", ["[]", "[None]", "[null]", "['', nan]", "[{'raw': '개'}]", '[{"raw": "개"}]', '[["개"]]']
)
def test_written_lists_without_a_text_are_no_captions(cell) -> None:
    assert clean_captions(cell) == []


@given(st.lists(st.one_of(st.none(), st.text())), st.sampled_from([str, json.dumps]))
def test_a_written_list_is_the_list(items, form) -> None:
    assert clean_captions(form(items)) == clean_captions(items)


@given(st.text())
def test_any_text_in_brackets_is_cleaned(text) -> None:
    for cell in (f"[{text}]", f"['{text}']", f'["{text}"]', f"[{text}"):
        assert all(normalize(caption) == caption for caption in clean_captions(cell))


def test_lists_behind_the_first_samples_of_a_tar(tmp_path) -> None:
    cells: list[Any] = ["개"] * 6 + [["새", "참새"], None, ["말"], "소"]
    samples = [{"jpg": b"", "json": json.dumps({"captions": cell}).encode()} for cell in cells]
    write_tar(tmp_path / "rows.tar", samples)
    config = source(tmp_path / "rows.tar", image="jpg", captions={"ko": "json.captions"})
    assert read(config) == [["개"]] * 6 + [["새", "참새"], [], ["말"], ["소"]]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("&quot;개&quot; &#39;고양이&#39; &#xAC1C;", "\"개\" '고양이' 개"),
        ("a&nbsp;&nbsp;b", "a b"),
        ("&amp;quot;twice&amp;quot;", '"twice"'),
        ("&lt;|endoftext|&gt; 개 &lt;/s&gt;", "개"),
        ("a&#8203;b &#xFEFF;c &#0;d", "ab c \ufffdd"),
        ("caf&eacute; e&#769;", "café é"),
        ("&#12644;&nbsp;", ""),
        ("R&D, AT&T, a & b; fish&chips", "R&D, AT&T, a & b; fish&chips"),
    ],
)
def test_html_entities_are_characters(text, clean) -> None:
    assert normalize(text) == clean


@given(st.text(alphabet="&amp;#38x26ltgquo가\u200b\u037e|<>s/[SEP] ", max_size=40))
def test_normalize_is_idempotent_with_entities(text) -> None:
    assert normalize(normalize(text)) == normalize(text)


def test_entities_as_in_open_clips_tokenizer() -> None:
    import open_clip.tokenizer

    for text in ("Tom &amp; Jerry", "&amp;quot;twice&amp;quot;", "caf&eacute; &#39;a&#39;", "R&D &lt;3"):
        assert normalize(text) == open_clip.tokenizer.basic_clean(text)


EXPECTED = {"a.jpg": ["개"], "나.jpg": ["새", "참새"]}
ROWS = [{"image": name, "captions": captions} for name, captions in EXPECTED.items()]
LAYOUTS: dict[str, tuple[Any, str]] = {
    "rows under a key": ({"version": "1", "data": ROWS}, "its rows in 'data'"),
    "captions by name": (EXPECTED, "captions by the name of the image"),
    "a list per column": ({name: [row[name] for row in ROWS] for name in ROWS[0]}, "one list per column"),
    "an object per column": (
        {name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]},
        "one object per column",
    ),
}


def convert(error: SourceError, folder: Path) -> list[Path]:
    """Run the lines that an error tells, and return the files that they have made."""
    before = set(folder.rglob("*"))
    exec("import" + str(error).split("\nimport", 1)[1], {})
    return sorted(set(folder.rglob("*")) - before)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_refused_with_the_lines_that_convert_them(
    tmp_path, name, indent, encoding, streaming
) -> None:
    data, layout = LAYOUTS[name]
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    (tmp_path / "captions [1].json").write_text(text, encoding=encoding)
    setting = encoding.removesuffix("-sig")
    path = tmp_path / "captions [1].json"
    with pytest.raises(SourceError, match=r"captions \[1\]\.json") as caught:
        open_source(source(path, streaming=streaming, encoding=setting))
    assert layout in str(caught.value)
    (path,) = convert(caught.value, tmp_path)
    rows = all_rows(open_source(source(path, streaming=streaming)))
    assert {row.image: row.captions["ko"] for row in rows} == {tmp_path / n: t for n, t in EXPECTED.items()}


# Layouts that a format of their own reads, and that format.
FORMATS: dict[str, Any] = {
    "coco": {"images": [{"id": 3, "file_name": "a.jpg"}], "annotations": [{"image_id": 3, "caption": "개"}]},
    "karpathy": {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "개"}]}]},
    "json_per_image": {"image": {"file_name": "a.jpg"}, "annotation": {"caption": [{"korean": "개"}]}},
}
COLUMNS = {"json_per_image": {"image": "image.file_name", "captions": {"ko": "annotation.caption.korean"}}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_layout_with_a_format_of_its_own_names_it(tmp_path, name) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "rows.json").write_text(json.dumps(FORMATS[name], ensure_ascii=False, indent=2), encoding="utf-8")
    config = source(tmp_path / "rows.json", **COLUMNS.get(name, {}))
    with pytest.raises(SourceError, match=f"format: {name}"):
        open_source(config)
    assert read(replace(config, format=name)) == [["개"]]


def test_the_lines_work_where_the_command_runs(tmp_path, monkeypatch) -> None:
    """A relative path stays one in the lines that are told."""
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    Path("rows/captions.json").write_text(json.dumps(EXPECTED), encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        open_source(source(Path("rows/captions.json")))
    assert [path.name for path in convert(caught.value, tmp_path)] == ["captions.jsonl"]


def test_a_single_row_is_a_row(tmp_path) -> None:
    """What looks like a document but has the columns that the source names."""
    row = {"image": "a.png", "captions": ["개", "강아지"], "boxes": [{"x": 1}], "meta": {"id": 3}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read(source(tmp_path / "rows.jsonl")) == [["개", "강아지"]]
    sentences = {"ko": ["개", "새"], "en": ["a dog", "a bird"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(sentences, ensure_ascii=False), encoding="utf-8")
    assert read(source(tmp_path / "rows.jsonl", image=None, captions={"ko": "ko", "en": "en"})) == [["개", "새"]]
