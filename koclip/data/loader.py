"""The training loader: batches from map-style or streamed sources, in this process or in worker processes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from koclip.config import DataConfig
from koclip.data.batches import Assembler, Batch, Position, SeededRow
from koclip.data.order import BatchPart, MapOrder, RowDraw, generator
from koclip.data.sources import MapSource, Row, SourceError, StreamSource, open_source
from koclip.data.survey import CaptionLengths, single_threaded, survey_source
from koclip.text.normalize import usable

Result = TypeVar("Result")

PREFETCH = 4  # batches or micro-batches that each worker prepares in advance


class Start(NamedTuple):
    """The point at which the loader starts."""

    step: int = 0  # steps already done
    positions: Sequence[Position] = ()  # of the stream readers, from a checkpoint
    first_step: int = 0  # step at which these readers started


class MapPairs(Dataset[Batch]):
    """Reads the rows of a batch at once; a random row of the same source replaces an unusable row.

    The random row depends only on the draw that it replaces.
    """

    def __init__(self, sources: Sequence[MapSource], assembler: Assembler) -> None:
        self._sources, self._assembler = sources, assembler
        self._seed = assembler.config.seed

    def __getitem__(self, draws: list[RowDraw]) -> Batch:
        rows: dict[RowDraw, Row] = {}
        for number, source in enumerate(self._sources):
            wanted = [draw for draw in draws if draw.source == number]
            if wanted:
                read = source.rows([draw.row for draw in wanted], self._assembler.needs_images)
                rows.update(zip(wanted, read, strict=True))
        return self._assembler.fill(self._candidates(draw, rows[draw]) for draw in draws)

    def _candidates(self, draw: RowDraw, row: Row) -> Iterator[SeededRow]:
        """Yield the row of a draw, then rows that replace it."""
        yield SeededRow(row, draw.source, draw.seed(self._seed))
        source = self._sources[draw.source]
        for attempt in itertools.count():
            number = generator("replace", *draw.seed(self._seed), attempt).randrange(len(source))
            other = source.rows([number], self._assembler.needs_images)[0]
            yield SeededRow(other, draw.source, draw._replace(row=number).seed(self._seed))


class StreamPairs(IterableDataset[Batch]):
    """Batches of streamed rows. Each reader (a worker of a process) has its own shards, pools and batches."""

    def __init__(self, sources: Sequence[StreamSource], assembler: Assembler, part: BatchPart, start: Start) -> None:
        self._sources, self._assembler, self._part, self._step = sources, assembler, part, start.step
        self._start = {position.reader: position for position in start.positions}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader calls its workers in turn, from 0: after a resume, worker 0 must continue as the next reader.
        reader = self._part.rank * count + (number + self._step) % count
        position = self._start.get(reader, Position(reader))
        rows = MixedRows(self._sources, self._assembler.config, position, self._part.world_size * count)
        draws = PooledDraws(rows, self._assembler, self._part.batch_size, position)
        while True:
            batch = self._assembler.fill(itertools.islice(draws, self._part.batch_size))
            yield dataclasses.replace(batch, position=draws.position)


class PooledDraws(Iterator[Iterator[SeededRow]]):
    """The draws of one reader, endlessly: pool after pool, in chunks of captions of similar length.

    A draw yields its row, then the next rows of the same source, which replace it while it is unusable.
    """

    def __init__(self, rows: "MixedRows", assembler: Assembler, batch_size: int, position: Position) -> None:
        self._rows, self._assembler, self._batch_size = rows, assembler, batch_size
        self.position = position
        self._pool: list[SeededRow] = []
        if position.samples:
            self._read(position.chunks, position.chunk_size)
            del self._pool[len(self._pool) - position.samples :]
            self.position = position
            for source, count in enumerate(position.replaced):
                for _ in range(count):
                    rows.take(source)

    def __next__(self) -> Iterator[SeededRow]:
        if not self._pool:
            self._read(self._assembler.config.length_pool, self._batch_size)
        self.position = self.position._replace(samples=self.position.samples + 1)
        candidate = self._pool.pop()
        return itertools.chain([candidate], self._others(candidate.source))

    def _others(self, source: int) -> Iterator[SeededRow]:
        while True:
            replaced = list(self.position.replaced)
            replaced[source] += 1
            self.position = self.position._replace(replaced=tuple(replaced))
            yield self._rows.take(source)

    def _read(self, chunks: int, size: int) -> None:
        """Read a pool of rows, in reverse order of drawing."""
        self.position = self._rows.position()._replace(chunks=chunks, chunk_size=size)
        pool = list(itertools.islice(self._rows, chunks * size))
        chosen = (self._assembler.chooser.caption(drawn.row.captions, drawn.source, drawn.seed) for drawn in pool)
        lengths = self._assembler.lengths([choice and choice[2] for choice in chosen])
        order = sorted(range(len(pool)), key=lengths.__getitem__)
        starts = np.random.default_rng(pool[0].seed).permutation(range(0, len(pool), size))
        self._pool = [pool[place] for start in starts for place in order[start : start + size]][::-1]


class MixedRows(Iterator[SeededRow]):
    """The rows of one reader, from all streams, mixed by weight, endlessly, from the start of a pool."""

    def __init__(
        self, sources: Sequence[StreamSource], config: DataConfig, position: Position, num_readers: int
    ) -> None:
        self._sources, self._reader, self._count, self._seed = sources, position.reader, position.rows, config.seed
        self._order = (config.seed, config.shuffle_buffer, position.reader, num_readers)
        self._passes = list(position.passes or [(0, 0)] * len(sources))  # for each source: epoch, and rows of it read
        self._rows = [self._open(number) for number in range(len(sources))]
        self._weights = [source.config.weight or 1.0 for source in sources]

    def _open(self, source: int) -> Iterator[Row]:
        epoch, num_read = self._passes[source]
        return itertools.islice(self._sources[source].rows(epoch, *self._order), num_read, None)

    def position(self) -> Position:
        """Return the resume point here."""
        return Position(self._reader, self._count, tuple(self._passes), replaced=(0,) * len(self._passes))

    def __next__(self) -> SeededRow:
        number = 0
        if len(self._sources) > 1:
            key = (self._seed, self._reader, self._count)
            number = generator("source", *key).choices(range(len(self._sources)), self._weights)[0]
        return self.take(number)

    def take(self, source: int) -> SeededRow:
        """Return the next row of a source, which starts again, in another order, when it ends."""
        epoch, num_read = self._passes[source]
        row = next(self._rows[source], None)
        if row is None:
            if num_read == 0:
                raise SourceError(f"source {self._sources[source].config.path!r}: the shards of a reader have no rows")
            self._passes[source] = (epoch + 1, 0)
            self._rows[source] = self._open(source)
            return self.take(source)
        self._passes[source] = (epoch, num_read + 1)
        self._count += 1
        return SeededRow(row, source, (self._seed, self._reader, self._count - 1))


def train_loader(
    assembler: Assembler,
    part: BatchPart,
    start: Start | None = None,
    lengths: Sequence[CaptionLengths | None] = (),
) -> Iterator[Batch]:
    """Yield this process's batches from the assembler's sources, endlessly, one micro-batch at a time.

    `lengths` are the caption lengths of every source, from the survey; by default they are measured here.

    Raises:
        SourceError: a source cannot be opened, streams are mixed with other sources or have too few shards, or
            `start.positions` belong to another number of readers.
    """
    config, start = assembler.config, start or Start()
    sources = [open_source(source, config.seed) for source in config.sources]
    streams = [source for source in sources if isinstance(source, StreamSource)]
    if not streams:
        maps = cast(list[MapSource], sources)
        if not lengths and config.length_pool > 1:
            lengths = [survey_source(source, config, assembler.tokenizer).lengths for source in maps]
        order = MapOrder(maps, assembler.chooser, part, start.step, lengths)
        return _load(MapPairs(maps, assembler), config.num_workers, sampler=order)
    if len(streams) < len(sources):
        raise SourceError("data.sources: some sources are streamed and some are not; set streaming for all or none")
    _check_readers(streams, part, max(1, config.num_workers), start)
    pairs = StreamPairs(streams, assembler, part, start)
    # Readers make whole batches, so that the rows of a batch do not depend on the size of its micro-batches.
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
            generator=torch.Generator(),  # the default would use the generator of dropout
            **options,
        )
    )


def _check_readers(streams: Sequence[StreamSource], part: BatchPart, count: int, start: Start) -> None:
    """Check that every reader (`count` per process) has a shard of every stream, and a position after a resume."""
    done, positions = range(start.first_step, start.step), start.positions
    num_readers = part.world_size * count
    for stream in streams:
        if stream.num_shards < num_readers:
            raise SourceError(
                f"source {stream.config.path!r}: got {stream.num_shards} shards, expected {num_readers} or more, one "
                "for each reader (data.num_workers x processes); write more files, or set fewer workers or streaming: "
                "false"
            )
    started = {step % count for step in done[:count]}  # workers take turns
    expected = {rank * count + reader for rank in range(part.world_size) for reader in started}
    readers = {position.reader for position in positions}
    if positions and readers != expected:
        raise SourceError(
            f"the checkpoint has {len(readers)} readers of streamed data (data.num_workers x processes), this run has "
            f"{num_readers}; resume with the same number of workers and processes"
        )
    if any(len(position.passes) != len(streams) for position in positions):
        raise SourceError(
            f"data.sources: the checkpoint has {len(positions[0].passes)} streamed sources, this run has "
            f"{len(streams)}; resume with the same number of sources"
        )


class _Parts(Dataset[Result]):
    """Reads a range of rows of a source."""

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
    """Yield the result of `read` for each part of a source's rows, until the rows end.

    The parts are ascending ranges of row numbers; `read` gets the rows and their range. The last part of a stream may
    have fewer rows. A stream is read in this process, other sources in `num_workers` processes.
    """
    if isinstance(source, MapSource):
        # The default generator would be the generator of dropout.
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
    """Yield every caption of the sources, one row of each in turn, to train a tokenizer."""
    sources = [open_source(source, config.seed).iter_rows(images=False) for source in config.sources]
    while sources:
        for rows in list(sources):
            row = next(rows, None)
            if row is None:
                sources.remove(rows)
                continue
            for texts in row.captions.values():
                yield from usable(texts)
