"""A dirty data set: two tables of one name whose rows have, five of each kind, what real collections have.

`USED` and `LISTED` are the kinds. A used row has a picture and a caption; a listed one has not, and must be named in
skipped.jsonl. What is wrong with a whole file is refused, in tests of its own: test_shards, test_text_files,
test_caption_cells, test_files.
"""

import csv
import io
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from koclip.config import SourceConfig

PER_KIND = 5
CAPTIONS = {"ko": "ko", "en": "en"}
Record = dict[str, Any]


class Dirty(NamedTuple):
    """What `write` writes: two sources, and which rows of each are used and which are listed."""

    sources: list[SourceConfig]
    used: list[set[int]]
    listed: list[set[int]]


def picture(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def narrow() -> bytes:
    """Return a PNG of 20,000 x 1 pixels, a hundred bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 20_001))
        + chunk(b"IEND", b"")
    )


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(number), exif=exif)


def row(number: int, name: str, data: bytes | None = None, **cells: Any) -> tuple[Record, bytes | None]:
    """Return a row of a table and its picture's bytes."""
    ko, en = [f"{number}번 사진", f"사진 {number}"], [f"photo number {number}", f"a photo, {number}"]
    return {"image": name, "ko": ko, "en": en, **cells}, encoded(picture(number)) if data is None else data


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


Maker = Callable[[int], tuple[Record, bytes | None]]
USED: dict[str, Maker] = {
    "clean": lambda n: row(n, f"{n}.jpg"),
    "gaps at different places": lambda n: row(
        n, f"{n}.jpg", ko=[f"하나 {n}", "", f"셋 {n}", f"넷 {n}"], en=[f"one {n}", f"two {n}", f"three {n}", ""]
    ),
    "HTML entities": lambda n: row(n, f"{n}.jpg", ko=[f"고양이 &amp; 개 {n}"], en=[f"a cat &amp; a dog {n}"]),
    "special tokens": lambda n: row(n, f"{n}.jpg", ko=[f"빨간 공 {n}<|endoftext|>"], en=[f"[SEP] a red ball {n}"]),
    "invisible characters": lambda n: row(
        n, f"{n}.jpg", ko=[f"\ufeff빨간\u200b 공\u3164{n}"], en=[f"a red\u00ad ball {n}"]
    ),
    "decomposed captions": lambda n: row(n, f"{n}.jpg", ko=[decomposed(f"파란 별 {n}")], en=[f"a blue star {n}"]),
    "decomposed names": lambda n: row(n, decomposed(f"사진{n}.jpg")),
    "names like patterns": lambda n: row(n, f"[{n}]*?.jpg"),
    "one name in many folders": lambda n: row(n, f"{n}/photo.jpg"),
    "turned by EXIF": lambda n: row(n, f"{n}.jpg", turned(n)),
    "sixteen bits": lambda n: row(
        n, f"{n}.png", encoded(Image.fromarray(np.asarray(picture(n).convert("L")).astype(np.uint16) * 257), "PNG")
    ),
    "the picture of another row": lambda n: row(n, f"{n}.jpg", encoded(picture(n % PER_KIND))),
}
LISTED: dict[str, Maker] = {
    "no picture": lambda n: (row(n, f"gone-{n}.jpg")[0], None),
    "a picture cut off": lambda n: row(n, f"{n}.jpg", encoded(picture(n))[:700]),
    "no picture's name": lambda n: (row(n, f"{n}.jpg\0")[0], None),
    "20,000 x 1 pixels": lambda n: row(n, f"{n}.png", narrow()),
    "values of no agreed range": lambda n: row(
        n, f"{n}.tif", encoded(Image.fromarray(np.full((8, 8), 300.0 + n, np.float32)), "TIFF")
    ),
    "no captions": lambda n: row(n, f"{n}.jpg", ko=[], en=[]),
    "missing captions": lambda n: row(n, f"{n}.jpg", ko=[None, "nan"], en=["", "  "]),
}
# Of the CSV file: cells are text.
USED_CELLS: dict[str, Maker] = {
    "clean": lambda n: row(n, f"{n}.jpg", ko=f"{n}번 사진", en=f"photo {n}"),
    "written lists": lambda n: row(n, f"{n}.jpg", ko=f"['{n}번 개', '고양이 {n}']", en=f'["dog {n}", "cat {n}"]'),
    "names like numbers": lambda n: row(n, f"{n:05d}", ko=f"{n}번 사진", en=f"photo {n}"),
    "quotes, commas and lines": lambda n: row(n, f"{n}.jpg", ko=f'"{n}번", 사진\n둘째 줄', en=f'a "photo", {n}'),
}
LISTED_CELLS: dict[str, Maker] = {
    "empty cells": lambda n: row(n, f"{n}.jpg", ko="", en=""),
    "no picture": lambda n: (row(n, f"gone-{n}.jpg", ko=f"{n}번", en=f"no. {n}")[0], None),
}


def write(folder: Path) -> None:
    """Write pairs.jsonl and cells/pairs.csv beside their pictures; the kinds of rows take turns."""
    (folder / "cells").mkdir()
    rows = _rows(folder, [*USED.values(), *LISTED.values()], 0)
    lines = [json.dumps(record, ensure_ascii=False) for record in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "cells" / "pairs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["image", "ko", "en"])
        writer.writeheader()
        writer.writerows(_rows(folder / "cells", [*USED_CELLS.values(), *LISTED_CELLS.values()], 500))


def described(folder: Path) -> Dirty:
    """Return what `write` writes into a folder."""
    kinds = [(len(USED), len(LISTED)), (len(USED_CELLS), len(LISTED_CELLS))]
    rows = [set(range(PER_KIND * (good + bad))) for good, bad in kinds]
    used = [{n for n in own if n % (good + bad) < good} for own, (good, bad) in zip(rows, kinds, strict=True)]
    paths = folder / "pairs.jsonl", folder / "cells" / "pairs.csv"
    sources = [SourceConfig(path=str(path), captions=CAPTIONS) for path in paths]
    return Dirty(sources, used, [own - good for own, good in zip(rows, used, strict=True)])


def _rows(folder: Path, makers: list[Maker], first: int) -> list[Record]:
    """Write pictures, and return the rows that name them."""
    records = []
    for number, maker in enumerate(makers * PER_KIND):
        record, data = maker(first + number)
        if data is not None:
            file = folder / "pictures" / record["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        name = unicodedata.normalize("NFC", record["image"])  # as a table from elsewhere has it
        records.append({**record, "image": f"pictures/{name}"})
    return records
