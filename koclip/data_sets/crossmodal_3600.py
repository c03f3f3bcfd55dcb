"""Crossmodal-3600: photos with captions that people wrote in Korean and in English, from Google's files."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from koclip.data_sets.archives import member, members
from koclip.data_sets.data_set import IMAGE, TEXT, DataSet, Row, count, write_table
from koclip.data_sets.downloads import Download, fetch

ROWS = 3_600
# No checksum of these is published: the first download is recorded.
_CAPTIONS = Download("captions.zip", "https://google.github.io/crossmodal-3600/web-data/captions.zip", 200 * 10**6)
_PHOTOS = Download("images.tgz", "https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz", 5 * 10**9)
_COLUMNS = {
    "image": IMAGE,
    "image_id": TEXT,
    "image_locale": TEXT,
    "captions_ko": datasets.List(TEXT),
    "captions_en": datasets.List(TEXT),
}

TERMS = """\
Crossmodal-3600 (Thapliyal, Pont-Tuset, Chen and Soricut 2022): https://google.github.io/crossmodal-3600.
Captions: by Google; the licence is on that page. Photos: from Open Images, listed there as CC BY 2.0, each by its
author on Flickr; whoever uses them has to check the licence of each photo. For evaluation: train on nothing of it.
"""


def build(folder: Path, target: Path) -> None:
    """Write test.parquet."""
    captions = {
        row["image/key"]: row
        for row in map(json.loads, member(fetch(_CAPTIONS, folder), "captions.jsonl", 2**29).splitlines())
    }
    rows = count(_rows(fetch(_PHOTOS, folder), captions), ROWS, "Crossmodal-3600")
    write_table(target / "test.parquet", rows, _COLUMNS)


def _rows(archive: Path, captions: dict[str, Row]) -> Iterator[Row]:
    for name, content in members(archive, r"(?:.*/)?[0-9a-f]{16}\.jpg", max_bytes=2**26):
        row = captions[Path(name).stem]
        yield {
            "image": {"bytes": content, "path": Path(name).name},
            "image_id": Path(name).stem,
            "image_locale": row["image/locale"],
            "captions_ko": row["ko"]["caption"],
            "captions_en": row["en"]["caption"],
        }


DATA_SET = DataSet(
    name="crossmodal_3600",
    summary="3,600 photos from all over the world, two or more captions each in Korean and in English; to test on",
    size="size not known; downloads are limited to 5.2 GB",
    licence="see its page; photos listed as CC BY 2.0",
    home="https://google.github.io/crossmodal-3600",
    terms=TERMS,
    research_only=False,
    build=build,
)
