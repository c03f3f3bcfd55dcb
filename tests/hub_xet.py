"""Xet uploads to the Hub on localhost: pieces of files ("xorbs"), put together as "shards" say.

Formats: https://huggingface.co/docs/xet/xorb and https://huggingface.co/docs/xet/shard.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow
from hub_http import RefusedError, Requests

XET_TOKEN = "xet_" + "token" * 6
_RECORD, _BOOKEND = 48, b"\xff" * 32  # bytes; every record has the same length
_VERIFIED, _METADATA = 1 << 31, 1 << 30


class XetRequests(Requests):
    """What a client asks for that uploads by Xet. The server's handler has the other methods."""

    writer: Callable[[], None]
    tree_of: Callable[[str, str], tuple[str, dict[str, tuple[bytes, bool]]]]

    def xet_token(self, repo: str, revision: str) -> dict[str, Any]:
        self.writer()
        self.tree_of(repo, revision)
        return {"accessToken": XET_TOKEN, "exp": int(time.time()) + 3_600, "casUrl": f"{self.server.url}/cas"}

    def chunk(self, name: str) -> None:
        raise RefusedError(404, f"nobody has chunk {name}")

    def xorb(self, name: str) -> dict[str, Any]:
        self.xet_writer()
        known = name in self.server.xorbs
        self.server.xorbs[name] = chunks(self.body)
        return {"was_inserted": not known}

    def shard(self) -> dict[str, Any]:
        self.xet_writer()
        self.server.large |= dict(files(self.body, self.server.xorbs))
        return {"result": 1}

    def xet_writer(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise RefusedError(401, "no token of the Hub's for Xet")


def chunks(xorb: bytes) -> list[bytes]:
    """Return the chunks of a xorb, unpacked; what follows them is the client's own footer."""
    contents, place = [], 0
    while place < len(xorb) and xorb[place] == 0:  # the version of a chunk's header
        packed = int.from_bytes(xorb[place + 1 : place + 4], "little")
        kind, size = xorb[place + 4], int.from_bytes(xorb[place + 5 : place + 8], "little")
        data = xorb[place + 8 : place + 8 + packed]
        if kind:
            data = pyarrow.decompress(data, decompressed_size=size, codec="lz4", asbytes=True)
        contents.append(ungrouped(data) if kind == 2 else data)
        place += 8 + packed
    return contents


def ungrouped(data: bytes) -> bytes:
    """Return bytes that were grouped by their place in words of four."""
    whole = np.empty(len(data), np.uint8)
    start = 0
    for first in range(4):
        group = whole[first::4]
        group[:] = np.frombuffer(data, np.uint8, len(group), start)
        start += len(group)
    return whole.tobytes()


def files(shard: bytes, xorbs: dict[str, list[bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield the sha256 and the content of each file that a shard describes.

    Raises:
        RefusedError: a xorb is not there, or a content is another than it says.
    """
    records = (shard[start : start + _RECORD] for start in range(_RECORD, len(shard), _RECORD))
    while not (header := next(records)).startswith(_BOOKEND):
        flags, count = struct.unpack_from("<II", header, 32)
        parts = [struct.unpack("<4Q4I", next(records)) for _ in range(count)]
        for _ in range(count if flags & _VERIFIED else 0):
            next(records)
        sha256 = hexadecimal(next(records)) if flags & _METADATA else ""
        content = b""
        for *name, _, _, start, end in parts:
            xorb = xorbs.get("".join(f"{word:016x}" for word in name))
            if xorb is None:
                raise RefusedError(400, "a xorb of this shard was not uploaded")
            content += b"".join(xorb[start:end])
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RefusedError(400, "a file of this shard has another hash")
        yield sha256, content


def hexadecimal(record: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", record))
