"""The training loader: rows of map-style or streamed sources -> batches, made here or in worker processes."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from koclip.config import DataConfig
from koclip.data.batches import Assembler, Batch, Candidate, Known, Position, generator
from koclip.data.formats.files import SourceError
from koclip.data.order import Draw, MapOrder, Shard, row_seed
from koclip.data.sources import MapSource, Row, StreamSource, open_source
from koclip.data.survey import single_threaded
from koclip.data.transforms import Views
from koclip.text.normalize import usable

PREFETCH = 4  # batches, or pieces of one, that each worker has ready


class MapPairs(Dataset[Batch]):
    """Fetches a whole batch of draws at once; an unusable row is replaced by a random row of its source.

    Which one is a function of the draw that it replaces, whatever else is in the batch.
    """

    def __init__(self, sources: Sequence[MapSource], assembler: Assembler) -> None:
        self._sources, self._assembler = sources, assembler
        self._seed = assembler.config.seed

    def __getitem__(self, draws: list[Draw]) -> Batch:
        rows: dict[Draw, Row] = {}
        for number, source in enumerate(self._sources):
            wanted = [draw for draw in draws if draw.source == number]
            if wanted:
                read = source.rows([draw.row for draw in wanted], self._assembler.sees)
                rows.update(zip(wanted, read, strict=True))
        candidates = (self._candidate(draw, rows[draw]) for draw in draws)
        return self._assembler.fill(
            itertools.chain([candidate], self._others(draw)) for draw, candidate in zip(draws, candidates, strict=True)
        )

    def _others(self, draw: Draw) -> Iterator[Candidate]:
        source = self._sources[draw.source]
        for attempt in itertools.count():
            row = generator("replace", *row_seed(self._seed, draw), attempt).randrange(len(source))
            other = draw._replace(row=row)
            yield self._candidate(other, source.rows([row], self._assembler.sees)[0])

    def _candidate(self, draw: Draw, row: Row) -> Candidate:
        return Candidate(row, draw.source, row_seed(self._seed, draw))


class StreamPairs(IterableDataset[Batch]):
    """Batches of streamed rows. Each reader (a worker of a process) has shards, pools and batches of its own."""

    def __init__(
        self, sources: Sequence[StreamSource], assembler: Assembler, shard: Shard, start: Sequence[Position], step: int
    ) -> None:
        self._sources, self._assembler, self._shard, self._step = sources, assembler, shard, step
        self._start = {position.reader: position for position in start}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn, from 0: after a resume the first of them must play the next reader.
        reader = self._shard.rank * count + (number + self._step) % count
        position = self._start.get(reader, Position(reader))
        rows = MixedRows(self._sources, self._assembler.config, position, self._shard.world_size * count)
        draws = PooledDraws(rows, self._assembler, self._shard.batch_size, position)
        while True:
            batch = self._assembler.fill(itertools.islice(draws, self._shard.batch_size))
            yield dataclasses.replace(batch, position=draws.position)


class PooledDraws(Iterator[Iterator[Candidate]]):
    """One reader's draws, without end: a pool of rows after the other, in chunks of captions of similar length.

    A draw is its row, then those that replace it while it is unusable: the next ones of the same source.
    """

    def __init__(self, rows: "MixedRows", assembler: Assembler, batch_size: int, position: Position) -> None:
        self._rows, self._assembler, self._batch_size = rows, assembler, batch_size
        self.position = position
        self._pool: list[Candidate] = []
        if position.samples:
            self._read(position.chunks, position.chunk_size)
            del self._pool[len(self._pool) - position.samples :]
            self.position = position
            for source, count in enumerate(position.replaced):
                for _ in range(count):
                    rows.take(source)

    def __next__(self) -> Iterator[Candidate]:
        if not self._pool:
            self._read(self._assembler.config.length_pool, self._batch_size)
        self.position = self.position._replace(samples=self.position.samples + 1)
        candidate = self._pool.pop()
        return itertools.chain([candidate], self._others(candidate.source))

    def _others(self, source: int) -> Iterator[Candidate]:
        while True:
            replaced = list(self.position.replaced)
            replaced[source] += 1
            self.position = self.position._replace(replaced=tuple(replaced))
            yield self._rows.take(source)

    def _read(self, chunks: int, size: int) -> None:
        """Read a pool of rows; the next to be drawn is the last of the list."""
        self.position = self._rows.position()._replace(chunks=chunks, chunk_size=size)
        pool = list(itertools.islice(self._rows, chunks * size))
        captions = [self._assembler.caption(one.row.captions, one.source, one.seed) for one in pool]
        lengths = self._assembler.lengths(captions)
        order = sorted(range(len(pool)), key=lengths.__getitem__)
        starts = np.random.default_rng(pool[0].seed).permutation(range(0, len(pool), size))
        self._pool = [pool[place] for start in starts for place in order[start : start + size]][::-1]


class MixedRows(Iterator[Candidate]):
    """One reader's rows of streamed sources, mixed by weight, without end, from the beginning of a pool on."""

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
        return Position(self._reader, self._count, passes, replaced=(0,) * len(passes))

    def __next__(self) -> Candidate:
        number = 0
        if len(self._parts) > 1:
            key = (self._seed, self._reader, self._count)
            number = generator("source", *key).choices(range(len(self._parts)), self._weights)[0]
        return self.take(number)

    def take(self, source: int) -> Candidate:
        """Return the next row of a source."""
        seed = (self._seed, self._reader, self._count)
        row = next(self._parts[source])
        self._count += 1
        return Candidate(row, source, seed)


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
        known: Lengths of captions, and features that frozen towers made of the data.
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
        order = MapOrder(maps, assembler, shard, start_step, known.lengths if known else ())
        return _load(MapPairs(maps, assembler), config.num_workers, sampler=order)
    if len(streams) < len(sources):
        raise SourceError("data.sources mixes streamed sources with others; set streaming: true on all of them or none")
    _check_readers(streams, shard, max(1, config.num_workers), range(first_step, start_step), positions)
    pairs = StreamPairs(streams, assembler, shard, positions, start_step)
    # Readers make whole batches, so that the size of the pieces does not decide which rows are in them.
    batches = _load(pairs, config.num_workers, prefetch=max(1, PREFETCH // len(shard.pieces)))
    return itertools.chain.from_iterable(batch.cut(shard.pieces) for batch in batches)


def _load(pairs: Dataset[Batch], num_workers: int, prefetch: int = PREFETCH, **options: Any) -> Iterator[Batch]:
    if num_workers:
        single_threaded()
        options |= {"persistent_workers": True, "prefetch_factor": prefetch}
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
    """Make sure that every reader (`count` per process) has a shard of every stream, and its position at `done`."""
    num_readers = shard.world_size * count
    for stream in streams:
        if stream.num_shards < num_readers:
            raise SourceError(
                f"source {stream.config.path!r} is streamed from {stream.num_shards} shards, too few for {num_readers} "
                "readers (data.num_workers x processes); write it in more files, set fewer workers or streaming: false"
            )
    started = {step % count for step in done[:count]}  # they are asked in turn
    expected = {rank * count + reader for rank in range(shard.world_size) for reader in started}
    found = {position.reader for position in positions}
    if positions and found != expected:
        raise SourceError(
            f"the checkpoint was made by {len(found)} readers of streamed data (data.num_workers x processes), this "
            f"run has {num_readers}; resume with as many workers and processes as before"
        )
    if any(len(position.passes) != len(streams) for position in positions):
        raise SourceError(
            f"data.sources: the checkpoint was made of {len(positions[0].passes)} streamed sources, this run has "
            f"{len(streams)}; a stream can only go on among the same number of them"
        )


def training_captions(config: DataConfig) -> Iterator[str]:
    """Yield every caption of the sources, a row of each in turn: what a tokenizer is trained on."""
    sources = [open_source(source, config.seed).iter_rows(images=False) for source in config.sources]
    while sources:
        for rows in list(sources):
            row = next(rows, None)
            if row is None:
                sources.remove(rows)
                continue
            for texts in row.captions.values():
                yield from usable(texts)
