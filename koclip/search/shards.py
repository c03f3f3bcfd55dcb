"""The files of an index: shards of embeddings with what is told and shown of each image, memory-mapped.

A shard `shard-000123.safetensors` holds, of n images, `embeddings` (n, D) bf16 of unit norm before rounding, and two
runs of bytes with the places where each image's part ends: `records` (one JSON object per image: key, captions) and
`thumbnails` (JPEGs; empty where none were asked for). Its header lists what was left out. Of all that it was made of,
what was left out among it, it keeps what tells whether that has changed since (`koclip.search.contents`). It is there
whole or not at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from koclip import storage
from koclip.config import ConfigError, check
from koclip.data.sources import Skip
from koclip.search.contents import Content, pack, unpack

SHARD = "shard-{:06}.safetensors"
FACTS = "index.json"
ROWS = 2_048  # images in a shard, at most: what a killed build loses


class Entry(NamedTuple):
    """What an index keeps of one image besides its embedding."""

    record: dict[str, Any]  # key: str; captions: list of texts by language
    thumbnail: bytes = b""


def write(
    path: Path,
    embeddings: torch.Tensor,
    entries: Sequence[Entry],
    skipped: Sequence[Skip] = (),
    contents: Sequence[Content] = (),
) -> None:
    """Write a shard of n images, embeddings (n, D), what was left out of it, and what it was made of."""
    records = [json.dumps(entry.record, ensure_ascii=False).encode() for entry in entries]
    tensors = {"embeddings": embeddings.to(torch.bfloat16).contiguous()} | (pack(contents) if contents else {})
    for name, parts in (("records", records), ("thumbnails", [entry.thumbnail for entry in entries])):
        tensors[name] = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)
        tensors[f"{name}_ends"] = torch.tensor(np.cumsum([len(part) for part in parts]), dtype=torch.int64)
    with storage.atomic(path) as partial:
        save_file(tensors, partial, {"skipped": json.dumps(skipped)})


class Shards:
    """The shards of a directory, in order.

    Raises:
        ConfigError: one is broken, or is of another width than the others.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        read = [_read(path) for path in paths]
        self._shards = [shard for shard, _ in read]
        self.skipped = [skip for _, skipped in read for skip in skipped]
        widths = {shard["embeddings"].shape[1] for shard in self._shards if len(shard["embeddings"])}
        check(len(widths) <= 1, "index", sorted(widths), "expected shards of one width: build it again")
        self.width = widths.pop() if widths else 0
        self.rows = [shard["embeddings"] for shard in self._shards]  # (n, D) bf16 each, read when they are used
        self.starts = np.cumsum([0, *(len(one) for one in self.rows)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def entry(self, place: int) -> Entry:
        """Return what is kept of an image."""
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        shard, row = self._shards[number], place - int(self.starts[number])
        return Entry(json.loads(_part(shard, "records", row)), _part(shard, "thumbnails", row))

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, D) float32 at these places (n,), which ascend."""
        numbers = np.searchsorted(self.starts, places.numpy(), side="right") - 1
        parts = [
            self.rows[number][places[numbers == number] - int(self.starts[number])].float()
            for number in np.unique(numbers)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)


def read_facts(directory: Path) -> dict[str, Any]:
    """Return what an index says of itself.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = directory / FACTS
    made_by = "python recipes/index.py --model <model> --images <folder> --output_dir <index> makes one"
    check(file.is_file(), "index", str(directory), f"no {FACTS} there; {made_by}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"index: {file} is broken: {error}; delete {directory}; {made_by}") from error


def read_contents(path: Path) -> list[Content]:
    """Return what a shard was made of, what was left out among it.

    Raises:
        ConfigError: it is broken.
    """
    try:
        return unpack(_read(path)[0])
    except (KeyError, ValueError) as error:
        raise _broken(path, error) from error


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write what an index says of itself."""
    storage.replace_text(directory / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list[Skip]]:
    """Return a shard's parts, and what was left out of it."""
    try:
        with safe_open(path, framework="pt") as file:
            skipped = [Skip(*skip) for skip in json.loads((file.metadata() or {}).get("skipped", "[]"))]
        shard = load_file(path)  # maps the file, reads nothing
        if shard["embeddings"].dtype != torch.bfloat16 or len(shard["records_ends"]) != len(shard["embeddings"]):
            raise ValueError("its parts do not fit together")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _broken(path, error) from error
    return shard, skipped


def _broken(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"index: {path} is broken: {error}; delete it and run the same command again")


def _part(shard: dict[str, torch.Tensor], name: str, row: int) -> bytes:
    ends = shard[f"{name}_ends"]
    return shard[name][int(ends[row - 1]) if row else 0 : int(ends[row])].numpy().tobytes()
