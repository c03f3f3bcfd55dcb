"""The training loader: rows of map-style or streamed sources -> batches, made here or in worker processes."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from koclip.config import DataConfig
from koclip.data.batches import Assembler, Batch, Candidate, Known, Position, generator
from koclip.data.order import Draw, MapOrder, Shard, row_seed
from koclip.data.sources import MapSource, Row, StreamSource, open_source
from koclip.data.tables import SourceError
from koclip.data.transforms import Views
from koclip.text.normalize import usable


class MapPairs(Dataset[Batch]):
    """Fetches a whole batch of draws at once; an unusable row is replaced by a random row of its source."""

    def __init__(self, sources: Sequence[MapSource], assembler: Assembler) -> None:
        self._sources, self._assembler = sources, assembler
        self._seed = assembler.config.seed

    def __getitem__(self, draws: list[Draw]) -> Batch:
        return self._assembler.fill(len(draws), itertools.chain(self._drawn(draws), self._others(draws)))

    def _drawn(self, draws: list[Draw]) -> list[Candidate]:
        rows: dict[Draw, Row] = {}
        for number, source in enumerate(self._sources):
            wanted = [draw for draw in draws if draw.source == number]
            if wanted:
                read = source.rows([draw.row for draw in wanted], self._assembler.sees)
                rows.update(zip(wanted, read, strict=True))
        return [self._candidate(draw, rows[draw]) for draw in draws]

    def _others(self, draws: list[Draw]) -> Iterator[Candidate]:
        rng = generator("replace", *row_seed(self._seed, draws[0]))
        while True:
            draw = rng.choice(draws)
            source = self._sources[draw.source]
            other = draw._replace(row=rng.randrange(len(source)))
            yield self._candidate(other, source.rows([other.row], self._assembler.sees)[0])

    def _candidate(self, draw: Draw, row: Row) -> Candidate:
        return Candidate(row, draw.source, row_seed(self._seed, draw))


class StreamPairs(IterableDataset[Batch]):
    """Batches of streamed rows. Each reader (a worker of a process) has shards, pools and batches of its own."""

    def __init__(
        self, sources: Sequence[StreamSource], assembler: Assembler, shard: Shard, start: Sequence[Position], step: int
    ) -> None:
        self._sources, self._assembler, self._shard = sources, assembler, shard
        self._size = shard.micro_batch_size or shard.batch_size
        self._start = {position.reader: position for position in start}
        self._made = step * len(shard.pieces)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn, from 0: after a resume the first of them must play the next reader.
        reader = self._shard.rank * count + (number + self._made) % count
        position = self._start.get(reader, Position(reader))
        rows = MixedRows(self._sources, self._assembler.config, position, self._shard.world_size * count)
        made = position.batches
        while True:
            start = rows.position()
            for batches, batch in enumerate(self._pool(rows), start=1):
                if batches > made:
                    yield dataclasses.replace(batch, position=start._replace(batches=batches))
            made = 0

    def _pool(self, rows: "MixedRows") -> Iterator[Batch]:
        """Read a pool of rows and yield batches of it, each of captions of similar length."""
        size = self._size
        pool = list(itertools.islice(rows, self._assembler.config.length_pool * size))
        lengths = self._assembler.lengths([self._assembler.caption(one.row.captions, *one[1:]) for one in pool])
        order = sorted(range(len(pool)), key=lengths.__getitem__)
        for start in np.random.default_rng(pool[0].seed).permutation(range(0, len(pool), size)):
            candidates = (pool[place] for place in order[start : start + size])
            yield self._assembler.fill(size, itertools.chain(candidates, rows))


class MixedRows(Iterator[Candidate]):
    """One reader's rows of streamed sources, mixed by weight, without end, from a position on."""

    def __init__(
        self, sources: Sequence[StreamSource], config: DataConfig, position: Position, num_readers: int
    ) -> None:
        self._reader, self._count, self._seed = position.reader, position.rows, config.seed
        starts = position.passes or [(0, 0)] * len(sources)
        self._parts = [
            _Endless(source, config, position.reader, num_readers, *start)
            for source, start in zip(sources, starts, strict=True)
        ]
        self._weights = [source.config.weight or 1.0 for source in sources]

    def position(self) -> Position:
        """Return what it takes to go on from here."""
        passes = tuple((part.epoch, part.rows) for part in self._parts)
        return Position(self._reader, self._count, passes=passes)

    def __next__(self) -> Candidate:
        seed = (self._seed, self._reader, self._count)
        number = 0
        if len(self._parts) > 1:
            number = generator("source", *seed).choices(range(len(self._parts)), self._weights)[0]
        row = next(self._parts[number])
        self._count += 1
        return Candidate(row, number, seed)


class _Endless(Iterator[Row]):
    """One reader's rows of a stream, which starts over, in another order, when it ends."""

    def __init__(
        self, source: StreamSource, config: DataConfig, reader: int, num_readers: int, epoch: int, rows: int
    ) -> None:
        self._source, self.epoch, self.rows = source, epoch, rows
        self._order = (config.seed, config.shuffle_buffer, reader, num_readers)
        self._rows: Iterator[Row] = itertools.islice(source.rows(epoch, *self._order), rows, None)

    def __next__(self) -> Row:
        row = next(self._rows, None)
        if row is None:
            if self.rows == 0:
                raise SourceError(f"a reader of source {self._source.config.path!r} found no row in its shards")
            self.epoch, self.rows = self.epoch + 1, 0
            self._rows = self._source.rows(self.epoch, *self._order)
            return next(self)
        self.rows += 1
        return row


def train_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    views: Views | None,
    shard: Shard,
    start_step: int = 0,
    positions: Sequence[Position] = (),
    known: Known | None = None,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Yield this process's batches from `start_step` on, without end; if the shard has pieces, piece by piece.

    Args:
        config: What to read and how to mix it.
        tokenizer: Tokenizes the captions.
        views: What the model is shown of an image; None for batches without images.
        shard: This process's part of the global batch.
        start_step: Steps already done.
        positions: Where the readers of streamed sources were, from a checkpoint.
        known: Features that frozen towers made of the data.
        first_step: Steps that were done when the readers of streamed sources began.

    Raises:
        SourceError: a source cannot be opened, streamed sources are mixed with others or have too few shards, or
            `positions` are of another number of readers.
    """
    sources = [open_source(source, config.seed) for source in config.sources]
    assembler = Assembler(config, tokenizer, views, known)
    streams = [source for source in sources if isinstance(source, StreamSource)]
    if not streams:
        maps = cast(list[MapSource], sources)
        order = MapOrder(maps, assembler, shard, start_step)
        return _load(MapPairs(maps, assembler), config.num_workers, sampler=order)
    if len(streams) < len(sources):
        raise SourceError("data.sources mixes streamed sources with others; set streaming: true on all of them or none")
    if shard.micro_batch_size and shard.batch_size % shard.micro_batch_size:
        raise SourceError(
            f"train.micro_batch_size: got {shard.micro_batch_size}; with streamed sources train.batch_size "
            f"({shard.batch_size}) must be a multiple of it"
        )
    done = range(first_step * len(shard.pieces), start_step * len(shard.pieces))
    _check_readers(streams, shard, max(1, config.num_workers), done, positions)
    return _load(StreamPairs(streams, assembler, shard, positions, start_step), config.num_workers)


def _load(pairs: Dataset[Batch], num_workers: int, **options: Any) -> Iterator[Batch]:
    if num_workers:
        # Tokenizers must not use threads in forked workers; said aloud, they do not warn about it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        options |= {"persistent_workers": True, "prefetch_factor": 4}
    return iter(
        DataLoader(
            pairs,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the default would draw from the generator that dropout uses
            **options,
        )
    )


def _check_readers(
    streams: Sequence[StreamSource], shard: Shard, count: int, done: range, positions: Sequence[Position]
) -> None:
    """Make sure that every reader (`count` per process) has a shard of every stream, and its position of `done`."""
    num_readers = shard.world_size * count
    for stream in streams:
        if stream.num_shards < num_readers:
            raise SourceError(
                f"source {stream.config.path!r} is streamed from {stream.num_shards} shards, too few for {num_readers} "
                "readers (data.num_workers x processes); write it in more files, set fewer workers or streaming: false"
            )
    started = {batch % count for batch in done[:count]}  # they are asked in turn
    expected = {rank * count + reader for rank in range(shard.world_size) for reader in started}
    found = {position.reader for position in positions}
    if positions and found != expected:
        raise SourceError(
            f"the checkpoint was made by {len(found)} readers of streamed data (data.num_workers x processes), this "
            f"run has {num_readers}; resume with as many workers and processes as before"
        )


def training_captions(config: DataConfig) -> Iterator[str]:
    """Yield every caption of the sources, a row of each in turn: what a tokenizer is trained on."""
    rows = [_captions(open_source(source, config.seed)) for source in config.sources]
    while rows:
        for source in list(rows):
            captions = next(source, None)
            if captions is None:
                rows.remove(source)
                continue
            for texts in captions.values():
                yield from usable(texts)


def _captions(source: MapSource | StreamSource, size: int = 1_000) -> Iterator[dict[str, list[str]]]:
    """Yield a source's captions row by row, in stored order."""
    if isinstance(source, StreamSource):
        yield from source.captions()
        return
    for start in range(0, len(source), size):
        yield from source.captions(range(start, min(start + size, len(source))))
