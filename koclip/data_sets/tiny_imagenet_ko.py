"""Tiny-ImageNet-200 with Korean and English class names, from Stanford's archive."""

import re
from collections.abc import Iterator
from pathlib import Path

from koclip.data_sets.archives import member, members
from koclip.data_sets.data_set import CLASS_COLUMNS, DataSet, Row, class_facts, count, write_table
from koclip.data_sets.downloads import Download, fetch

TRAIN_PER_CLASS, VAL_PER_CLASS = 60, 50
_ARCHIVE = Download(
    "tiny-imagenet-200.zip",
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)
_ROOT = "tiny-imagenet-200"

TERMS = """\
Tiny-ImageNet-200, made for Stanford's course CS231n of photos of ImageNet: https://www.image-net.org.
Terms of ImageNet: for non-commercial research and education only; the photos may not be redistributed.
Korean class names: koclip, Apache License 2.0.
"""


def build(folder: Path, target: Path) -> None:
    """Write train.parquet and val.parquet."""
    archive = fetch(_ARCHIVE, folder)
    classes = len(_facts())
    train = count(_train(archive), classes * TRAIN_PER_CLASS, "Tiny-ImageNet, train")
    val = count(_val(archive), classes * VAL_PER_CLASS, "Tiny-ImageNet, val")
    write_table(target / "train.parquet", train, CLASS_COLUMNS)
    write_table(target / "val.parquet", val, CLASS_COLUMNS)


def _train(archive: Path) -> Iterator[Row]:
    """Yield the first photos of every class, by their numbers."""
    facts = _facts()
    first = "|".join(str(number) for number in range(TRAIN_PER_CLASS))
    for name, content in members(archive, rf"{_ROOT}/train/(n\d+)/images/\1_(?:{first})\.JPEG", max_bytes=2**20):
        file = Path(name).name
        yield {"image": {"bytes": content, "path": f"train/{file}"}, **facts[file.split("_")[0]]}


def _val(archive: Path) -> Iterator[Row]:
    """Yield all validation photos; a table in the archive has their classes."""
    facts = _facts()
    table = member(archive, f"{_ROOT}/val/val_annotations.txt").decode()
    keys = dict(re.findall(r"^(val_\d+\.JPEG)\t(n\d+)\t", table, re.MULTILINE))
    for name, content in members(archive, rf"{_ROOT}/val/images/val_\d+\.JPEG", max_bytes=2**20):
        file = Path(name).name
        yield {"image": {"bytes": content, "path": f"val/{file}"}, **facts[keys[file]]}


def _facts() -> dict[str, Row]:
    """Return the columns of a class by its WordNet id."""
    return {facts["key"]: facts for facts in class_facts("tiny_imagenet")}


DATA_SET = DataSet(
    name="tiny_imagenet_ko",
    summary="small photos of 200 classes with Korean and English names: 10,000 to test on, 12,000 to fit probes on",
    size="downloads 248 MB, writes 45 MB",
    licence="ImageNet's terms: non-commercial research only, no redistribution",
    home=_ARCHIVE.url,
    terms=TERMS,
    research_only=True,
    build=build,
)
