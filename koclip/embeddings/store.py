"""A directory of embeddings: facts in JSON, and memory-mapped shards in safetensors.

`embeddings.json` describes the data and the model of the embeddings. A directory with other facts is refused. A shard
`shard-000123.safetensors`, in the directory or in a subfolder, stores m items (images or texts), in order:

- `digests` (m, 16): a hash of each item's content; `row_hashes` (m, 16) and `stamps` (m, 3): of its row and its file,
  or zeros if they are not needed;
- `embeddings` (n, V, D): V views of each of the n items that could be embedded;
- `records` and `thumbnails`: n byte strings each, concatenated, with their end positions; only in an index.

The header lists the items without an embedding, with the reasons, and a checksum. A shard is complete or absent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from xxhash import xxh3_64_hexdigest, xxh3_128

from koclip import storage
from koclip.config import ConfigError, check
from koclip.data.transforms import MissingError

FORMAT = 4
FACTS = "embeddings.json"
SHARD = "shard-{:06}.safetensors"
SHARDS = "shard-*.safetensors"
NO_FILE = (0, 0, 0)
_OLD = ("features.json", "index.json")  # facts of formats 1 to 3
NO_HASH = bytes(16)


class StoredItem(NamedTuple):
    """An image or a text in a shard."""

    key: str
    digest: bytes  # 16 bytes, a hash of its content
    reason: str = ""  # why it has no embedding; "" if it has an embedding
    row_hash: bytes = NO_HASH  # 16 bytes, a hash of its row's key and captions
    stamp: tuple[int, int, int] = NO_FILE  # of its file: size in bytes, mtime and ctime in ns


class Entry(NamedTuple):
    """The data of an image that an index shows in search results."""

    record: dict[str, Any]  # key: str; captions: lists of texts by language
    thumbnail: bytes = b""


@dataclass(frozen=True)
class Store:
    """A directory of embeddings."""

    path: Path
    key: str  # the configuration key of the directory, for error messages

    def facts(self) -> dict[str, Any] | None:
        """Return the facts; None if the directory has none.

        Raises:
            ConfigError: the facts cannot be read, or have an older format.
        """
        file = self.path / FACTS
        old = [name for name in _OLD if (self.path / name).exists()]
        if not file.exists() and not old:
            return None
        try:
            facts = {} if old else dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.key}: {file} is broken: {error}; delete {self.path}") from error
        expected = f"expected format {FORMAT}: delete {self.path} and run the same command again"
        check(facts.get("format") == FORMAT, f"{self.key}: {self.path}, format", facts.get("format"), expected)
        return facts

    def claim(self, facts: dict[str, Any], unchecked: Sequence[str] = ()) -> None:
        """Write the facts into a new directory, or compare them with the facts there, except the `unchecked` names.

        Raises:
            ConfigError: the directory has other facts.
        """
        stored = self.facts()
        if stored is None:
            self.write_facts(facts)
            return
        differing = [name for name in facts if name not in unchecked and stored.get(name) != facts[name]]
        if differing:
            changes = "; ".join(f"{name}: {stored.get(name)}, here {facts[name]}" for name in differing)
            raise ConfigError(
                f"{self.key}: the embeddings in {self.path} were computed from other data or settings ({changes}); "
                "delete the directory or name another"
            )

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write the facts; replace existing facts."""
        text = json.dumps({"format": FORMAT, **facts}, indent=2, ensure_ascii=False)
        storage.replace_text(self.path / FACTS, text + "\n")


class Shard:
    """A memory-mapped shard. Opening it reads only its header. `key` is that of its `Store`.

    Raises:
        ConfigError: the file is broken.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
            self._tensors = load_file(path)  # maps the file into memory
            self.embeddings = self._tensors["embeddings"]  # (n, V, D)
            self.digests = _as_keys(self._tensors["digests"])  # (m,)
            self._left_out = {index: (key, reason) for index, key, reason in notes["left_out"]}
            self._gaps = np.array(sorted(self._left_out), dtype=np.int64)
            self.checksum: str = notes["checksum"]
            if len(self.digests) and len(self.embeddings) != len(self.digests) - len(self._left_out):
                raise ValueError("the numbers of embeddings and items do not match")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._broken(error) from error

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Key and reason of each item without an embedding."""
        return list(self._left_out.values())

    @property
    def num_items(self) -> int:
        """Number of items, with or without an embedding."""
        return len(self.digests)

    @property
    def embedded(self) -> npt.NDArray[np.bytes_]:
        """The digests (n,) of the items with an embedding."""
        return np.delete(self.digests, self._gaps)

    def items(self) -> list[StoredItem]:
        """Return the items, without their keys, which are not stored."""
        parts = (self._tensors[name] for name in ("digests", "row_hashes", "stamps"))
        digests, row_hashes, stamps = (part.numpy() for part in parts)
        return [
            StoredItem("", digest.tobytes(), self.reason(index), row_hash.tobytes(), tuple(stamp))
            for index, (digest, row_hash, stamp) in enumerate(zip(digests, row_hashes, stamps.tolist(), strict=True))
        ]

    def reason(self, index: int) -> str:
        """Return why an item has no embedding; "" if it has an embedding."""
        return str(self._left_out.get(index, ("", ""))[1])

    def row(self, index: int) -> int:
        """Return the row of an item's embedding."""
        return index - int(np.searchsorted(self._gaps, index))

    def entry(self, row: int) -> Entry:
        """Return the index entry of an embedding."""
        return Entry(json.loads(self._part("records", row)), self._part("thumbnails", row))

    def verify(self) -> None:
        """Compare the checksum; this reads the whole file.

        Raises:
            ConfigError: the file is broken.
        """
        if self.checksum != _checksum(self._tensors):
            raise self._broken("its checksum is wrong")

    def check(self, items: Sequence[StoredItem]) -> None:
        """Verify the file, and check that it was computed from these items.

        Raises:
            ConfigError: the file is broken, or the items have changed.
        """
        self.verify()
        expected = np.frombuffer(b"".join(item.digest for item in items), dtype="S16")
        if np.array_equal(self.digests, expected):
            return
        change = f"got {len(items)} items, expected {self.num_items}"
        if self.num_items == len(items):
            change = f"the first that differs is {items[int(np.argmax(self.digests != expected))].key}"
        raise ConfigError(
            f"{self._key}: the data has changed since {self.path} was written: {change}; delete {self.path.parent}, or "
            "set another data.sources[].name: what has not changed is then copied"
        )

    def _part(self, name: str, row: int) -> bytes:
        ends = self._tensors[f"{name}_ends"]
        return self._tensors[name][int(ends[row - 1]) if row else 0 : int(ends[row])].numpy().tobytes()

    def _broken(self, error: object) -> ConfigError:
        return ConfigError(f"{self._key}: {self.path} is broken: {error}; delete it and run the same command again")


def write_shard(
    path: Path,
    embeddings: torch.Tensor,
    items: Sequence[StoredItem] = (),
    entries: Sequence[Entry] = (),
    shared: bool = False,
) -> None:
    """Write a shard of n embeddings (n, V, D).

    `items` are all items, those without an embedding too; or empty to store the embeddings alone. `entries` are the n
    entries of an index. Set `shared` if several processes may write the file at the same time.
    """
    tensors = {
        "embeddings": embeddings.contiguous(),
        "digests": _hashes([item.digest for item in items]),
        "row_hashes": _hashes([item.row_hash for item in items]),
        "stamps": torch.tensor([item.stamp for item in items], dtype=torch.int64).view(-1, 3),
    }
    if entries:
        records = [json.dumps(entry.record, ensure_ascii=False).encode() for entry in entries]
        for name, parts in (("records", records), ("thumbnails", [entry.thumbnail for entry in entries])):
            tensors[name] = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
            tensors[f"{name}_ends"] = torch.tensor(np.cumsum([len(part) for part in parts]), dtype=torch.int64)
    left_out = [(index, item.key, item.reason) for index, item in enumerate(items) if item.reason]
    notes = {"left_out": left_out, "checksum": _checksum(tensors)}
    # A single entry: safetensors writes several entries in random order.
    metadata = {"notes": json.dumps(notes, ensure_ascii=False)}
    with storage.atomic(path, shared) as partial:
        save_file(tensors, partial, metadata)


class Shards:
    """The shards at `paths` as one sequence of embeddings. `key` is that of their `Store`.

    Raises:
        ConfigError: a shard is broken, or the embeddings have different widths.
    """

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self._key = key
        self._shards = [Shard(path, key) for path in paths]
        self._unverified = list(self._shards)
        self.left_out = [pair for shard in self._shards for pair in shard.left_out]
        widths = {shard.embeddings.shape[-1] for shard in self._shards if len(shard.embeddings)}
        check(len(widths) <= 1, key, sorted(widths), "expected equal widths: delete the shards and build them again")
        self.width = widths.pop() if widths else 0
        self.rows = [shard.embeddings[:, 0] for shard in self._shards]  # (n, D) each, read when they are used
        self.starts = np.cumsum([0, *map(len, self.rows)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def entry(self, row: int) -> Entry:
        """Return the index entry of an embedding."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._shards[number].entry(row - int(self.starts[number]))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, D) float32 of these rows (n,), which must ascend."""
        numbers = np.searchsorted(self.starts, rows.numpy(), side="right") - 1
        parts = [
            self.rows[number][rows[numbers == number] - int(self.starts[number])].float()
            for number in np.unique(numbers)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    @property
    def checksum(self) -> str:
        """A hash of all shards."""
        return xxh3_64_hexdigest(" ".join(shard.checksum for shard in self._shards).encode())

    @cached_property
    def _by_digest(self) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sorted digests, the item number of each, and the number of each shard's first item."""
        digests = np.concatenate([shard.digests for shard in self._shards])
        order = np.argsort(digests)
        return digests[order], order, np.cumsum([0, *(shard.num_items for shard in self._shards)])

    @property
    def embedded(self) -> npt.NDArray[np.bytes_]:
        """The digests (n,) of the items with an embedding, in order."""
        return np.concatenate([np.empty(0, "S16"), *(shard.embedded for shard in self._shards)])

    @property
    def digests(self) -> npt.NDArray[np.bytes_]:
        """The digests of the items with an embedding, sorted."""
        return np.sort(self.embedded)

    def verify(self) -> None:
        """Compare the checksum of every shard, the first time; this reads the files.

        Raises:
            ConfigError: a file is broken.
        """
        while self._unverified:
            self._unverified[-1].verify()
            self._unverified.pop()

    def embedding(self, digest: bytes, view: int = 0) -> torch.Tensor:
        """Return the embedding (D,) float32 of a view of the item with this digest. See `views`."""
        return self.views(digest)[view].float()

    def views(self, digest: bytes) -> torch.Tensor:
        """Return the embeddings (V, D) of the item with this digest, in the type in which they are stored.

        Raises:
            MissingError: the item could not be embedded. The message gives the reason.
            ConfigError: the item was not in the data when the embeddings were computed.
        """
        digests, order, starts = self._by_digest
        wanted = np.frombuffer(digest, dtype="S16")[0]
        index = int(np.searchsorted(digests, wanted))
        if index == len(digests) or digests[index] != wanted:
            raise ConfigError(
                f"{self._key}: the data has changed during the run: an image or a caption is not in the cache; start "
                "again with another directory"
            )
        item = int(order[index])
        number = int(np.searchsorted(starts, item, side="right")) - 1
        shard, item = self._shards[number], item - int(starts[number])
        if reason := shard.reason(item):
            raise MissingError(reason)
        return shard.embeddings[shard.row(item)]


class Copies:
    """Embeddings that other shards hold, by digest."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.digests = shards, shards.digests

    def complete(self, items: Sequence[StoredItem], embedded: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (m, V, D) of items: those that were `embedded` (n, V, D), and copies of the others."""
        if len(embedded) == len(items):
            return embedded
        self._shards.verify()
        rows = iter(embedded)
        return torch.stack(
            [self._shards.views(item.digest) if holds(self.digests, item.digest) else next(rows) for item in items]
        )


def holds(digests: npt.NDArray[np.bytes_], digest: bytes) -> bool:
    """Return whether sorted digests have this digest."""
    wanted = np.frombuffer(digest, dtype="S16")[0]
    index = int(np.searchsorted(digests, wanted))
    return index < len(digests) and bool(digests[index] == wanted)


def _hashes(hashes: Sequence[bytes]) -> torch.Tensor:
    """Return hashes as (m, 16) uint8."""
    return torch.tensor(np.frombuffer(b"".join(hashes), dtype=np.uint8)).view(-1, 16)


def _as_keys(hashes: torch.Tensor) -> npt.NDArray[np.bytes_]:
    """Return (m, 16) uint8 as m sortable keys."""
    return np.ascontiguousarray(hashes.numpy()).view("S16").reshape(-1)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxh3_128()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
