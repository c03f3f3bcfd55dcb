"""Reads what features are made of, row by row: the images of a source, or its sentences in one language."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from koclip.data.features import ROWS, SHARD, Item, Piece, digest_of
from koclip.data.sources import MapSource, Row, StreamSource
from koclip.data.transforms import ImageError, Views, decode, read
from koclip.text.normalize import paired, usable

PIECE = 128  # rows read and embedded at a time


class Shard(NamedTuple):
    """The part of a source that one file of features is made of, in pieces."""

    path: Path
    exists: bool
    pieces: Iterable[Piece]


class Reader(Protocol):
    """How items are read from a source."""

    def stored(self, source: MapSource, rows: range) -> Sequence[Any]:
        """Return these rows of a map source, images not decoded."""

    def streamed(self, source: StreamSource) -> Iterator[Any]:
        """Yield all rows of a stream in stored order."""

    def piece(self, rows: Sequence[Any], wanted: bool) -> Piece:
        """Return what is in rows; only the digests if no features are wanted."""


class Images:
    """Every row's image, as `views.count` views of it."""

    def __init__(self, views: Views, max_pixels: int) -> None:
        self._views, self._max_pixels = views, max_pixels

    def stored(self, source: MapSource, rows: range) -> Sequence[Row]:
        """Return these rows."""
        return source.rows(rows)

    def streamed(self, source: StreamSource) -> Iterator[Row]:
        """Yield all rows."""
        return source.iter_rows()

    def piece(self, rows: Sequence[Row], wanted: bool) -> Piece:
        """Return one item per row; without features if its image cannot be used."""
        items: list[Item] = []
        made: list[torch.Tensor] = []
        for row in rows:
            digest, reason = digest_of(row.key.encode()), ""
            try:
                content = read(row.image)
                digest = digest_of(content)
                if wanted:
                    made.append(self._see(content, digest))
            except ImageError as error:
                reason = str(error)
            items.append(Item(digest, row.key, reason))
        # One tensor: each takes a file handle on its way from a worker, and there are only so many.
        return Piece(len(rows), items, torch.stack(made) if made else torch.empty(0))

    def _see(self, content: bytes | npt.NDArray[np.uint8], digest: bytes) -> torch.Tensor:
        """Return the views (V, 3, H, W) of an image."""
        image = decode(content, self._max_pixels)
        return torch.stack([self._views.numbered(image, digest, number) for number in range(self._views.count)])


class Sentences:
    """Every caption in one language, each once per piece of rows.

    `Piece.apart` counts what does not correspond to it: `rows/<language>`, rows with unequal numbers of captions in the
    two languages, and `captions/<language>`, captions that have none in this language in their place.
    """

    def __init__(self, language: str) -> None:
        self._language = language

    def stored(self, source: MapSource, rows: range) -> Sequence[dict[str, list[str]]]:
        """Return these rows' captions."""
        return source.captions(rows)

    def streamed(self, source: StreamSource) -> Iterator[dict[str, list[str]]]:
        """Yield all rows' captions."""
        return (row.captions for row in source.iter_rows(images=False))

    def piece(self, rows: Sequence[dict[str, list[str]]], wanted: bool) -> Piece:
        """Return the sentences."""
        sentences = list(dict.fromkeys(text for captions in rows for text in usable(captions.get(self._language, []))))
        items = [Item(digest_of(text.encode()), text[:80]) for text in sentences]
        return Piece(len(rows), items, sentences, self._apart(rows))

    def _apart(self, rows: Sequence[dict[str, list[str]]]) -> dict[str, int]:
        apart: Counter[str] = Counter()
        for captions in rows:
            for language, own in captions.items() if self._language in captions else ():
                places = paired(own, captions[self._language])
                apart[f"rows/{language}"] += places is None
                apart[f"captions/{language}"] += 0 if places is None else len(usable(own)) - len(places)
        return dict(apart)  # PyTorch's data loader doubles the numbers of a Counter


def shards(
    sources: Sequence[MapSource | StreamSource],
    reader: Reader,
    directory: Path,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Iterator[Shard]:
    """Yield this process's shards of every source; those that exist with digests only, to compare.

    Args:
        sources: The sources.
        reader: What to read of them.
        directory: Where the shards lie, in a folder per source.
        rank: This process's number: it has every `world_size`-th shard.
        world_size: Number of processes.
        num_workers: Processes of this one that read; sources that are streamed are read by itself.
    """
    for number, source in enumerate(sources):
        folder = directory / f"{number}-{source.config.short_name}"
        if isinstance(source, StreamSource):
            yield from _streamed(source, reader, folder, rank, world_size)
        else:
            numbers = range(rank, -(-len(source) // ROWS), world_size)
            yield from _stored(source, reader, folder, numbers, num_workers)


def _streamed(source: StreamSource, reader: Reader, folder: Path, rank: int, world_size: int) -> Iterator[Shard]:
    rows = reader.streamed(source)
    for number in itertools.count():
        part = list(itertools.islice(rows, ROWS))
        if not part:
            return
        if number % world_size == rank:
            path = folder / SHARD.format(number)
            exists = path.exists()
            starts = range(0, len(part), PIECE)
            yield Shard(path, exists, (reader.piece(part[start : start + PIECE], not exists) for start in starts))


class _Request(NamedTuple):
    """Rows of a piece, and whether features are to be made of them."""

    rows: range
    wanted: bool


class _Pieces(Dataset[Piece]):
    """Reads one piece per request, in worker processes if there are any."""

    def __init__(self, source: MapSource, reader: Reader) -> None:
        self._source, self._reader = source, reader

    def __getitem__(self, request: _Request) -> Piece:
        return self._reader.piece(self._reader.stored(self._source, request.rows), request.wanted)


def _stored(source: MapSource, reader: Reader, folder: Path, numbers: range, num_workers: int) -> Iterator[Shard]:
    paths = {number: folder / SHARD.format(number) for number in numbers}
    exists = {number: path.exists() for number, path in paths.items()}
    plan: dict[int, list[_Request]] = {}
    for number in numbers:
        rows = range(number * ROWS, min(len(source), (number + 1) * ROWS))
        starts = range(rows.start, rows.stop, PIECE)
        plan[number] = [_Request(range(start, min(start + PIECE, rows.stop)), not exists[number]) for start in starts]
    requests = cast(Any, list(itertools.chain(*plan.values())))
    # A generator of its own: the default would draw from the one that dropout uses.
    pieces = iter(
        DataLoader(
            _Pieces(source, reader), None, sampler=requests, num_workers=num_workers, generator=torch.Generator()
        )
    )
    for number in numbers:
        yield Shard(paths[number], exists[number], itertools.islice(pieces, len(plan[number])))
