"""Data sets that are not at hand: koclip reads made-up files of their documented layout, as cards and configs say."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_on_disk import all_rows, colour
from test_data_cards import ROOT, blocks, front_matter

from koclip.config import AlignConfig, SourceConfig, parse
from koclip.data.sources import open_source

CONFIGS = ROOT / "recipes" / "configs"
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
NAMES = [f"COCO_{part}_00000000000{n}.jpg" for n, part in enumerate(("train2014", "val2014", "train2014"))]


def card(name: str) -> Path:
    return ROOT / "data_cards" / f"{name}.md"


def run_block(name: str, folder: str) -> datasets.DatasetDict:
    """Run the block of a card that makes a file in `folder`, and return what it loads of it."""
    (block,) = [code for code in blocks(card(name)) if f'Path("{folder}")' in code]
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["data"], datasets.DatasetDict)
    return names["data"]


def read(source: SourceConfig) -> list[tuple[tuple[int, ...], dict[str, list[str]]]]:
    return [(colour(row), row.captions) for row in all_rows(open_source(source))]


@pytest.fixture
def coco(tmp_path, encoded, monkeypatch) -> Path:
    """Return a folder with three photos where COCO 2014 has them, below the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "coco"
    for name, shade in zip(NAMES, COLOURS, strict=True):
        (folder / name.split("_")[1]).mkdir(parents=True, exist_ok=True)
        (folder / name.split("_")[1] / name).write_bytes(encoded(shade))
    return folder


def test_coco_ko(coco):
    """AI Hub's file has both parts, English in `captions`, Korean in `caption_ko`, some of it empty."""
    rows = [
        {"file_path": f"{n.split('_')[1]}/{n}", "captions": [f"a {k}", "b"], "id": k, "caption_ko": [f"가 {k}", " "]}
        for k, n in enumerate(NAMES)
    ]
    (coco / "MSCOCO_train_val_Korean.json").write_text(json.dumps(rows), encoding="utf-8")
    data = run_block("coco_ko", "data/coco")
    assert {part: len(rows) for part, rows in data.items()} == {"train2014": 2, "val2014": 1}
    assert set(data["train2014"].column_names) == front_matter(card("coco_ko"))["columns"].keys()
    config = parse(AlignConfig, ["--config", str(CONFIGS / "align" / "coco_ko.yaml")])
    assert read(config.data.sources[0]) == [(COLOURS[0], {"ko": ["가 0", ""]}), (COLOURS[2], {"ko": ["가 2", ""]})]
    assert read(config.eval.sets[0].source) == [(COLOURS[1], {"ko": ["가 1", ""], "en": ["a 1", "b"]})]


def test_koclips_own_annotations(coco):
    """Its misc/split.py puts the Korean captions where COCO's were."""
    row = {"file_path": str(coco / "val2014" / NAMES[1]), "id": 1, "captions": ["가"], "caption_en": ["a"]}
    (coco / "valid_annotations.json").write_text(json.dumps([row]), encoding="utf-8")
    source = SourceConfig(path="data/coco/valid_annotations.json", format="annotations", captions={"ko": "captions"})
    assert read(source) == [(COLOURS[1], {"ko": ["가"]})]


@pytest.fixture
def photos() -> list[dict[str, list[str]]]:
    """Return captions of three photos, not equally many in both languages."""
    return [{"ko": ["가", "나", "다"][: n + 1], "en": ["a", "b"]} for n in range(3)]


def test_crossmodal_3600_of_the_hub(tmp_path, encoded, monkeypatch, photos):
    """Its photos are a struct of bytes and an empty path, not an image of `datasets`; a split is a language."""
    columns = front_matter(card("crossmodal_3600"))["columns"]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    values = {
        "image": pa.array([{"bytes": encoded(shade), "path": None} for shade in COLOURS], image),
        "image_id": pa.array(["0", "1", "2"]),
        "image_locale": pa.array(["ko", "ko", "fr"]),
        "captions": pa.array([captions["ko"] for captions in photos]),
    }
    assert values.keys() == columns.keys()
    pq.write_table(pa.table(values), tmp_path / "ko.parquet")
    rows = datasets.load_dataset("parquet", data_files={"ko": str(tmp_path / "ko.parquet")}, split="ko")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    source = SourceConfig(path="floschne/xm3600", split="ko", captions={"ko": "captions"})
    assert read(source) == [(shade, {"ko": captions["ko"]}) for shade, captions in zip(COLOURS, photos, strict=True)]
