"""What the images of a shard were made of, so that a replaced picture, or another caption, is noticed.

A file is taken for the same, and is not read, where its size and both of its times (mtime and ctime, ns) are. Programs
that copy a time stamp (`cp -p`, rsync, tar) set mtime, and the system sets ctime. Else a hash of its bytes decides, and
so it does for images that are in a table. What is missed: a file that is replaced by one of the same size within a tick
of the file system's clock (milliseconds), or where the file system keeps no ctime and mtime is set back.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from xxhash import xxh3_128_digest

from koclip.data.sources import Row
from koclip.data.transforms import ImageError, digest_of, read

_DIGEST = 16  # bytes
_NO_FILE = (0, 0, 0)


class Content(NamedTuple):
    """What tells a row from what it was."""

    record: bytes  # hash of its key and captions
    stamp: tuple[int, ...]  # of its file: size, mtime and ctime in ns; zeros where there is none
    digest: bytes  # hash of its image's bytes; zeros where they cannot be read


def look(row: Row) -> tuple[Content, Row]:
    """Return a row's content, and the row with its image read; one that cannot be read stays as it is."""
    stamp = _stamp(row.image)  # before it is read: what is written after that changes the stamp
    try:
        image = read(row.image)
    except ImageError:
        return Content(_record(row), stamp, bytes(_DIGEST)), row
    return Content(_record(row), stamp, digest_of(image)), row._replace(image=image)


def changed(contents: Iterable[Content], rows: Sequence[Row]) -> list[str]:
    """Return the keys of the rows that are not what they were; there are as many contents."""
    return [row.key for content, row in zip(contents, rows, strict=True) if not _same(content, row)]


def pack(contents: Sequence[Content]) -> dict[str, torch.Tensor]:
    """Return the contents of m rows as tensors: `hashes` (m, 2, 16) uint8 and `stamps` (m, 3) int64."""
    hashes = bytearray(b"".join(content.record + content.digest for content in contents))
    return {
        "hashes": torch.frombuffer(hashes, dtype=torch.uint8).view(-1, 2, _DIGEST),
        "stamps": torch.tensor([content.stamp for content in contents], dtype=torch.int64),
    }


def unpack(shard: dict[str, torch.Tensor]) -> list[Content]:
    """Return what was packed."""
    hashes, stamps = shard["hashes"].numpy(), shard["stamps"].tolist()
    return [
        Content(record.tobytes(), tuple(stamp), digest.tobytes())
        for (record, digest), stamp in zip(hashes, stamps, strict=True)
    ]


def _same(content: Content, row: Row) -> bool:
    if content.record != _record(row):
        return False
    if content.stamp != _NO_FILE and content.stamp == _stamp(row.image):
        return True
    return look(row)[0].digest == content.digest


def _record(row: Row) -> bytes:
    digest: bytes = xxh3_128_digest(repr((row.key, row.captions)).encode())
    return digest


def _stamp(image: Any) -> tuple[int, ...]:
    try:
        found = image.stat() if isinstance(image, Path) else None
    except (OSError, ValueError):
        found = None
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if found else _NO_FILE
