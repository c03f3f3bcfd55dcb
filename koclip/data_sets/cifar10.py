"""CIFAR-10 with Korean and English class names, from its author's archive in the binary format (no pickle)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from koclip.config import RunError
from koclip.data_sets.archives import member
from koclip.data_sets.data_set import CLASS_COLUMNS, DataSet, Row, class_facts, count, encoded, write_table
from koclip.data_sets.downloads import Download, fetch

_ARCHIVE = Download(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
ROWS_PER_FILE, _SIDE = 10_000, 32
_RECORD = 1 + 3 * _SIDE * _SIDE  # bytes: the label, then red, green and blue
_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}

TERMS = """\
CIFAR-10 by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton: https://www.cs.toronto.edu/~kriz/cifar.html.
No licence is stated; free use in research is customary. The authors ask to cite: Learning Multiple Layers of Features
from Tiny Images, Alex Krizhevsky, 2009.
Korean class names: koclip, Apache License 2.0.
"""


def build(folder: Path, target: Path) -> None:
    """Write train.parquet and test.parquet."""
    archive = fetch(_ARCHIVE, folder)
    for split, files in _FILES.items():
        rows = count(_rows(archive, split, files), ROWS_PER_FILE * len(files), f"CIFAR-10, {split}")
        write_table(target / f"{split}.parquet", rows, CLASS_COLUMNS)


def _rows(archive: Path, split: str, files: list[str]) -> Iterator[Row]:
    facts = class_facts("cifar10")
    for file in files:
        content = np.frombuffer(member(archive, f"cifar-10-batches-bin/{file}"), np.uint8)
        if content.size % _RECORD:
            raise RunError(f"{archive}: {file} has {content.size:,} bytes, expected a multiple of {_RECORD:,}")
        for number, record in enumerate(content.reshape(-1, _RECORD)):
            pixels = record[1:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
            path = f"{split}/{Path(file).stem}-{number:04}.png"
            image = {"bytes": encoded(Image.fromarray(np.ascontiguousarray(pixels)), "PNG"), "path": path}
            yield {"image": image, **facts[record[0]]}


DATA_SET = DataSet(
    name="cifar10",
    summary="tiny photos of ten classes with Korean and English names: 10,000 to test on, 50,000 to train on",
    size="downloads 170 MB, writes 150 MB",
    licence="none stated; free use in research is customary",
    home=_ARCHIVE.url,
    terms=TERMS,
    research_only=False,
    build=build,
)
