"""Compute the embeddings of data sources that are not stored yet, each process its own shards.

A shard is computed from the same rows in the same batches by any number of processes: filling can be stopped and go on,
and gives the same bytes.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

from koclip import distributed
from koclip.config import ConfigError, DataConfig
from koclip.data.loader import read_parts
from koclip.data.sources import MapSource, Row, StreamSource, open_source
from koclip.embeddings.store import SHARD, Entry, Item, Shard, Shards, Store, write_shard

ROWS = 1_024  # of a source in a shard
PIECE = 128  # rows read and embedded at a time


class Piece(NamedTuple):
    """Items that are read, and embedded, at a time."""

    num_rows: int
    items: list[Item]
    inputs: Any  # of the n items without a `reason`: views (n, V, 3, H, W) uint8, sentences, or pictures
    entries: Sequence[Entry] = ()  # what an index keeps of these n
    unpaired: dict[str, int] | None = None  # see `koclip.embeddings.sources.Captions`
    start: int = 0  # number of the first row


Embed = Callable[[Piece], torch.Tensor]  # returns (n, V, D)


class Reader(Protocol):
    """How the items of rows are read."""

    images: bool  # whether it needs the rows' images

    def piece(self, rows: Sequence[Row], wanted: bool) -> Piece:
        """Return the items of rows; without inputs unless their embeddings are wanted."""


def embed_shard(path: Path, pieces: Iterable[Piece], embed: Embed, dtype: torch.dtype) -> None:
    """Embed pieces, one at a time, and write them as a shard."""
    items: list[Item] = []
    entries: list[Entry] = []
    parts: list[torch.Tensor] = []
    for piece in pieces:
        items += piece.items
        entries += piece.entries
        if not all(item.reason for item in piece.items):
            parts.append(embed(piece).to(dtype).cpu())
    write_shard(path, torch.cat(parts) if parts else torch.zeros(0, 1, 0, dtype=dtype), items, entries)


@dataclass
class SourceShards:
    """This process's shards of a source.

    Args:
        source: The source.
        reader: What is read of its rows.
        folder: Where the shards are.
        rank: This process's number: it has every `world_size`-th shard.
        world_size: Number of processes.
    """

    source: MapSource | StreamSource
    reader: Reader
    folder: Path
    rank: int = 0
    world_size: int = 1
    _stored: dict[int, bool] = field(default_factory=dict)  # decided once: another run may fill the same directory

    def read(self, num_workers: int) -> Iterator[tuple[Path, bool, Iterator[Piece]]]:
        """Yield each shard's path, whether it is stored, and its pieces; the inputs only of those that are not."""
        for part in self._parts() if self.source.size is not None else ():
            self._is_stored(part)  # before worker processes start
        pieces = read_parts(self.source, self._parts(), self._piece, self.reader.images, num_workers)
        for number, members in itertools.groupby(pieces, lambda piece: piece.start // ROWS):
            yield self._path(number), self._stored[number], members

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _is_stored(self, part: range) -> bool:
        number = part.start // ROWS
        if number not in self._stored:
            self._stored[number] = self._path(number).exists()
        return self._stored[number]

    def _piece(self, rows: list[Row], part: range) -> Piece:
        return self.reader.piece(rows, wanted=not self._is_stored(part))._replace(start=part.start)

    def _parts(self) -> Iterator[range]:
        """Yield the rows of each piece; without end if the number of rows is not known."""
        size = self.source.size
        for number in itertools.count(self.rank, self.world_size):
            first, last = number * ROWS, (number + 1) * ROWS
            if size is not None:
                last = min(size, last)
                if first >= size:
                    return
            for start in range(first, last, PIECE):
                yield range(start, min(start + PIECE, last))


class Work(NamedTuple):
    """What is embedded, and how."""

    reader: Reader
    embed: Embed
    dtype: torch.dtype  # that is stored
    label: str  # of the progress bar


def fill(store: Store, facts: dict[str, Any], config: DataConfig, work: Work) -> tuple[Shards, list[Counter[str]]]:
    """Check the shards of the sources that are stored, compute the others; call it on every process.

    Returns:
        All shards, and for each source what `Piece.unpaired` counts.

    Raises:
        ConfigError: the directory holds embeddings of something else.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    if rank == 0:
        store.claim(facts)
    distributed.barrier()
    sources = [open_source(source, config.seed) for source in config.sources]
    own: list[Path] = []
    unpaired = [Counter[str]() for _ in sources]
    total = sum(source.size or 0 for source in sources)
    with tqdm(desc=work.label, total=total or None, unit=" rows", disable=rank > 0) as bar:
        for number, source in enumerate(sources):
            folder = store.path / f"{number}-{source.config.short_name}"
            shards = SourceShards(source, work.reader, folder, rank, world_size)
            for path, stored, members in shards.read(config.num_workers):
                pieces = _counted(members, bar, world_size, unpaired[number])
                if stored:
                    Shard(path, store.key).check([item for piece in pieces for item in piece.items])
                else:
                    embed_shard(path, pieces, work.embed, work.dtype)
                own.append(path)
    paths = sorted(itertools.chain(*distributed.gather_objects(own)))
    left_over = sorted(set(store.path.rglob("shard-*.safetensors")) - set(paths))
    if left_over:
        raise ConfigError(
            f"{store.key}: {left_over[0]} is of rows that the sources no longer have; delete {store.path} or name "
            "another directory"
        )
    everywhere = distributed.gather_objects(unpaired)
    return Shards(paths, store.key), [sum(parts, Counter()) for parts in zip(*everywhere, strict=True)]


def _counted(pieces: Iterable[Piece], bar: Any, world_size: int, unpaired: Counter[str]) -> Iterator[Piece]:
    """Pass pieces on, add up what is `unpaired` and move the bar, which takes all processes to be as fast as this."""
    for piece in pieces:
        unpaired.update(piece.unpaired or {})
        yield piece
        bar.update(min(piece.num_rows * world_size, (bar.total or math.inf) - bar.n))
