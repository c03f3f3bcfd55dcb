"""The training loader: rows of map-style or streamed sources -> batches, made here or in worker processes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from koclip.config import DataConfig
from koclip.data.batches import Assembler, Batch, Candidate, Position
from koclip.data.order import BatchPart, Draw, MapOrder, generator, row_seed
from koclip.data.sources import MapSource, Row, SourceError, StreamSource, open_source
from koclip.data.survey import CaptionLengths, single_threaded, survey
from koclip.text.normalize import usable

Result = TypeVar("Result")

PREFETCH = 4  # batches, or pieces of one, that each worker has ready


class Start(NamedTuple):
    """Where the loader begins."""

    step: int = 0  # steps already done
    positions: Sequence[Position] = ()  # of the readers of streamed sources, from a checkpoint
    first_step: int = 0  # steps that were done when these readers began


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
                read = source.rows([draw.row for draw in wanted], self._assembler.needs_images)
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
            yield self._candidate(other, source.rows([row], self._assembler.needs_images)[0])

    def _candidate(self, draw: Draw, row: Row) -> Candidate:
        return Candidate(row, draw.source, row_seed(self._seed, draw))


class StreamPairs(IterableDataset[Batch]):
    """Batches of streamed rows. Each reader (a worker of a process) has shards, pools and batches of its own."""

    def __init__(self, sources: Sequence[StreamSource], assembler: Assembler, part: BatchPart, start: Start) -> None:
        self._sources, self._assembler, self._part, self._step = sources, assembler, part, start.step
        self._start = {position.reader: position for position in start.positions}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn, from 0: after a resume the first of them must play the next reader.
        reader = self._part.rank * count + (number + self._step) % count
        position = self._start.get(reader, Position(reader))
        rows = MixedRows(self._sources, self._assembler.config, position, self._part.world_size * count)
        draws = PooledDraws(rows, self._assembler, self._part.batch_size, position)
        while True:
            batch = self._assembler.fill(itertools.islice(draws, self._part.batch_size))
            yield dataclasses.replace(batch, position=draws.position)


class PooledDraws(Iterator[Iterator[Candidate]]):
    """One reader's draws, without end: one pool of rows after another, in chunks of captions of similar length.

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
        chosen = (self._assembler.chooser.caption(drawn.row.captions, drawn.source, drawn.seed) for drawn in pool)
        lengths = self._assembler.lengths([choice and choice[2] for choice in chosen])
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
        order = (config.seed, config.shuffle_buffer, position.reader, num_readers)
        self._parts = [_Endless(source, order, *start) for source, start in zip(sources, starts, strict=True)]
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
    """One reader's rows of a stream, which starts over, in another order, when it ends.

    Args:
        source: The stream.
        order: Seed, size of the shuffle buffer, this reader and the number of readers.
        epoch: Passes already done.
        rows: Rows of this pass already read.
    """

    def __init__(self, source: StreamSource, order: tuple[int, int, int, int], epoch: int, rows: int) -> None:
        self._source, self._order, self.epoch, self.rows = source, order, epoch, rows
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
    assembler: Assembler,
    part: BatchPart,
    start: Start | None = None,
    lengths: Sequence[CaptionLengths | None] = (),
) -> Iterator[Batch]:
    """Yield this process's batches, without end; if the part has pieces, piece by piece.

    Args:
        assembler: Makes the batches, of the sources of its config.
        part: This process's part of the global batch.
        start: Where a resumed run begins.
        lengths: Those of the captions of every source, as `survey` returns them; default: they are measured now.

    Raises:
        SourceError: a source cannot be opened, streamed sources are mixed with others or have too few shards, or
            `start.positions` are of another number of readers.
    """
    config, start = assembler.config, start or Start()
    sources = [open_source(source, config.seed) for source in config.sources]
    streams = [source for source in sources if isinstance(source, StreamSource)]
    if not streams:
        maps = cast(list[MapSource], sources)
        if not lengths and config.length_pool > 1:
            lengths = [survey(source, config, assembler.tokenizer).lengths for source in maps]
        order = MapOrder(maps, assembler.chooser, part, start.step, lengths)
        return _load(MapPairs(maps, assembler), config.num_workers, sampler=order)
    if len(streams) < len(sources):
        raise SourceError("data.sources mixes streamed sources with others; set streaming: true on all of them or none")
    _check_readers(streams, part, max(1, config.num_workers), start)
    pairs = StreamPairs(streams, assembler, part, start)
    # Readers make whole batches, so that the size of the pieces does not decide which rows are in them.
    batches = _load(pairs, config.num_workers, prefetch=max(1, PREFETCH // len(part.pieces)))
    return itertools.chain.from_iterable(batch.cut(part.pieces) for batch in batches)


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


def _check_readers(streams: Sequence[StreamSource], part: BatchPart, count: int, start: Start) -> None:
    """Check that every reader (`count` per process) has a shard of every stream, and its position."""
    done, positions = range(start.first_step, start.step), start.positions
    num_readers = part.world_size * count
    for stream in streams:
        if stream.num_shards < num_readers:
            raise SourceError(
                f"source {stream.config.path!r} is streamed from {stream.num_shards} shards, too few for {num_readers} "
                "readers (data.num_workers x processes); write it in more files, set fewer workers or streaming: false"
            )
    started = {step % count for step in done[:count]}  # they are asked in turn
    expected = {rank * count + reader for rank in range(part.world_size) for reader in started}
    readers = {position.reader for position in positions}
    if positions and readers != expected:
        raise SourceError(
            f"the checkpoint has {len(readers)} readers of streamed data (data.num_workers x processes), this "
            f"run has {num_readers}; resume with as many workers and processes as before"
        )
    if any(len(position.passes) != len(streams) for position in positions):
        raise SourceError(
            f"data.sources: the checkpoint has {len(positions[0].passes)} streamed sources, this run has "
            f"{len(streams)}; a stream can only go on among the same number of them"
        )


class _Parts(Dataset[Result]):
    """Reads one part of a source's rows per range, in worker processes if there are any."""

    def __init__(self, source: MapSource, read: Callable[[list[Row], range], Result], images: bool) -> None:
        self._source, self._read, self._images = source, read, images

    def __getitem__(self, part: range) -> Result:
        return self._read(self._source.rows(part, self._images), part)


def read_parts(
    source: MapSource | StreamSource,
    parts: Iterable[range],
    read: Callable[[list[Row], range], Result],
    images: bool,
    num_workers: int,
) -> Iterator[Result]:
    """Yield what `read` returns of each part of a source's rows; ends where the rows do.

    Args:
        source: The source.
        parts: Numbers of rows, ascending.
        read: Takes the rows and their numbers. The last part of a stream may have fewer rows.
        images: Whether the rows' images are needed.
        num_workers: Processes that read; a stream is read in this process.
    """
    if isinstance(source, MapSource):
        # A generator of its own: the default would draw from the generator that dropout uses.
        options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
        yield from DataLoader(_Parts(source, read, images), None, sampler=cast(Any, list(parts)), **options)
        return
    rows, place = source.iter_rows(images), 0
    for part in parts:
        members = list(itertools.islice(rows, part.start - place, part.stop - place))
        if not members:
            return
        yield read(members, part)
        place = part.stop


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
