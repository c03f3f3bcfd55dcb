"""In which order samples are drawn, split over processes and grouped by caption length; the training loader.

The order is a function of (data.seed, step): a run that resumes at a step, or that has another number of processes
but the same global batch, sees the same global batches.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers import PreTrainedTokenizerBase

from koclip.config import DataConfig
from koclip.data.batches import Assembler, Batch, Position
from koclip.data.sources import MapSource, Row, SourceError, StreamSource, open_source


class Draw(NamedTuple):
    """One sample to be drawn: which row of which source, in which pass over the data."""

    source: int
    index: int
    epoch: int


class Shard(NamedTuple):
    """This process's part of every global batch of `batch_size * world_size` pairs."""

    batch_size: int
    rank: int = 0
    world_size: int = 1


class MapOrder(Sampler[list[Draw]]):
    """Yields this process's draws of every step from `start_step` on, without end.

    Rows of a source are permuted anew each epoch; nothing is dropped at an epoch's end. Within a pool of
    `length_pool` global batches, groups of rows are sorted by caption length, so that batches need little padding.
    """

    def __init__(self, sources: Sequence[MapSource], assembler: Assembler, shard: Shard, start_step: int) -> None:
        self._sources, self._assembler, self._shard, self._start_step = sources, assembler, shard, start_step
        self._config = assembler.config
        self._sizes = _rows_per_epoch(sources)
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[list[Draw]]:
        batch_size, rank, world_size = self._shard
        global_batch = batch_size * world_size
        pool, skip = divmod(self._start_step, self._config.length_pool)
        size = self._config.length_pool * global_batch
        while True:
            draws = self._pool(pool, size)
            batches = [draws[start : start + global_batch] for start in range(0, size, global_batch)]
            shuffled = self._rng(pool, 1).permutation(len(batches))
            for number in shuffled[skip:]:
                yield batches[number][rank * batch_size : (rank + 1) * batch_size]
            pool, skip = pool + 1, 0

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, *key])

    def _pool(self, pool: int, size: int) -> list[Draw]:
        """Return the draws of a pool, grouped by caption length."""
        epoch, offset = self._find(pool * size)
        draws: list[Draw] = []
        while len(draws) < size:
            part = self._epoch(epoch)[offset : offset + size - len(draws)]
            draws += [Draw(source, index, epoch) for source, index in part.tolist()]
            epoch, offset = epoch + 1, 0
        return draws if self._config.length_pool == 1 else self._by_length(draws)

    def _find(self, position: int) -> tuple[int, int]:
        """Return the epoch that the draw at `position` of the whole run falls into, and its place there."""
        return divmod(position, len(self._epoch(0)))

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return (source, row) of every draw of one pass, groups of rows kept together, in random order."""
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1]
        parts = []
        for number, (source, size) in enumerate(zip(self._sources, self._sizes, strict=True)):
            starts = _starts(len(source), source.group, size, self._rng(epoch, 2, number))
            parts.append(np.stack([np.full_like(starts, number), starts, np.full_like(starts, source.group)], axis=1))
        units = self._rng(epoch, 3).permutation(np.concatenate(parts))  # (source, first row, group)
        within = np.concatenate([np.arange(group) for group in units[:, 2]])
        rows = np.repeat(units[:, :2], units[:, 2], axis=0)
        rows[:, 1] += within
        self._cached = (epoch, rows)
        return rows

    def _by_length(self, draws: list[Draw]) -> list[Draw]:
        captions: list[str | None] = [None] * len(draws)
        for number, source in enumerate(self._sources):
            places = [place for place, draw in enumerate(draws) if draw.source == number]
            found = source.captions([draws[place].index for place in places])
            for place, choices in zip(places, found, strict=True):
                captions[place] = self._assembler.caption(choices, number, _seed(self._config, draws[place]))
        lengths = self._assembler.lengths(captions)
        longest: dict[tuple[int, int, int], int] = {}
        units = [(draw.source, draw.epoch, draw.index // self._sources[draw.source].group) for draw in draws]
        for unit, length in zip(units, lengths, strict=True):
            longest[unit] = max(length, longest.get(unit, 0))
        order = sorted(range(len(draws)), key=lambda place: (longest[units[place]], units[place]))
        return [draws[place] for place in order]


def _rows_per_epoch(sources: Sequence[MapSource]) -> list[int]:
    """Return how many rows each source gives to one epoch: its size, or its share by weight of all rows."""
    sizes = [len(source) for source in sources]
    weights = [source.config.weight for source in sources]
    if all(weight is None for weight in weights):
        return sizes
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    return [max(1, round(sum(sizes) * share / sum(shares))) for share in shares]


def _starts(rows: int, group: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return first rows of groups in random order, about `wanted` rows in all; every group comes up equally often."""
    starts = np.arange(0, rows - group + 1, group)
    count = max(1, round(wanted / group))
    passes = [rng.permutation(starts) for _ in range(-(-count // len(starts)))]
    return np.concatenate(passes)[:count]


def _seed(config: DataConfig, draw: Draw) -> tuple[int, ...]:
    return (config.seed, draw.epoch, draw.source, draw.index)


class MapPairs(Dataset[Batch]):
    """Fetches a whole batch of draws at once; an unusable row is replaced by a random row of its source."""

    def __init__(self, sources: Sequence[MapSource], assembler: Assembler) -> None:
        self._sources, self._assembler = sources, assembler

    def __getitem__(self, draws: list[Draw]) -> Batch:
        return self._assembler.fill(len(draws), self._candidates(draws))

    def _candidates(self, draws: list[Draw]) -> Iterator[tuple[Row, int, Sequence[int]]]:
        rows: list[Row | None] = [None] * len(draws)
        for number, source in enumerate(self._sources):
            places = [place for place, draw in enumerate(draws) if draw.source == number]
            found = source.rows([draws[place].index for place in places]) if places else []
            for place, row in zip(places, found, strict=True):
                rows[place] = row
        for row, draw in zip(rows, draws, strict=True):
            yield cast(Row, row), draw.source, _seed(self._assembler.config, draw)
        rng = np.random.default_rng([*_seed(self._assembler.config, draws[0]), 4])
        while True:
            draw = draws[int(rng.integers(len(draws)))]
            other = draw._replace(index=int(rng.integers(len(self._sources[draw.source]))))
            yield self._sources[draw.source].rows([other.index])[0], other.source, _seed(self._assembler.config, other)


class StreamPairs(IterableDataset[Batch]):
    """Batches of streamed rows. Each reader (a worker of a process) has shards, pools and batches of its own."""

    def __init__(
        self, sources: Sequence[StreamSource], assembler: Assembler, shard: Shard, start: Sequence[Position], step: int
    ) -> None:
        self._sources, self._assembler, self._shard = sources, assembler, shard
        self._start = {position.reader: position for position in start}
        self._step = step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn, from 0: after a resume the first of them must play the next reader.
        reader = self._shard.rank * count + (number + self._step) % count
        position = self._start.get(reader, Position(reader, 0, 0))
        rows = itertools.islice(self._rows(reader, self._shard.world_size * count), position.rows, None)
        counted = _Counted(rows, position.rows)
        made = position.batches
        while True:
            pool_start = counted.count
            for batches, batch in enumerate(self._pool(counted), start=1):
                if batches > made:
                    yield dataclasses.replace(batch, position=Position(reader, pool_start, batches))
            made = 0

    def _pool(self, rows: "_Counted") -> Iterator[Batch]:
        pool = [next(rows) for _ in range(self._assembler.config.length_pool * self._shard.batch_size)]
        captions = [self._assembler.caption(row.captions, source, seed) for row, source, seed in pool]
        lengths = self._assembler.lengths(captions)
        order = sorted(range(len(pool)), key=lengths.__getitem__)
        size = self._shard.batch_size
        starts = np.random.default_rng(pool[0][2]).permutation(range(0, len(pool), size))
        for start in starts:
            candidates = (pool[place] for place in order[start : start + size])
            yield self._assembler.fill(size, itertools.chain(candidates, rows))

    def _rows(self, reader: int, num_readers: int) -> Iterator[tuple[Row, int, Sequence[int]]]:
        """Yield rows of the sources mixed by weight, without end, each with a seed of its own."""
        config = self._assembler.config
        endless = [_Endless(source, config, reader, num_readers) for source in self._sources]
        weights = np.array([source.config.weight or 1.0 for source in self._sources])
        rng = np.random.default_rng([config.seed, reader, 5])
        for count in itertools.count():
            number = int(rng.choice(len(endless), p=weights / weights.sum())) if len(endless) > 1 else 0
            yield next(endless[number]), number, (config.seed, reader, number, count)


class _Counted(Iterator[tuple[Row, int, Sequence[int]]]):
    """An iterator that knows how many items it has given."""

    def __init__(self, items: Iterator[tuple[Row, int, Sequence[int]]], count: int) -> None:
        self._items, self.count = items, count

    def __next__(self) -> tuple[Row, int, Sequence[int]]:
        item = next(self._items)
        self.count += 1
        return item


class _Endless(Iterator[Row]):
    """A stream that starts over, in another order, when it ends."""

    def __init__(self, source: StreamSource, config: DataConfig, reader: int, num_readers: int) -> None:
        def passes() -> Iterator[Row]:
            for epoch in itertools.count():
                found = False
                for row in source.rows(epoch, config.seed, config.shuffle_buffer, reader, num_readers):
                    found = True
                    yield row
                if not found:
                    raise ValueError(
                        f"reader {reader + 1} of {num_readers} found no rows in {source.config.path!r}: use more shards "
                        "than data.num_workers x processes, or fewer workers"
                    )

        self._rows = passes()

    def __next__(self) -> Row:
        return next(self._rows)


def train_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    shard: Shard,
    start_step: int = 0,
    positions: Sequence[Position] = (),
) -> Iterator[Batch]:
    """Yield this process's batches from `start_step` on, without end.

    Args:
        config: What to read and how to mix it.
        tokenizer: Tokenizes the captions.
        image_size: Side of the crops, pixels.
        shard: This process's part of the global batch.
        start_step: Steps already done.
        positions: Where the readers of streamed sources were, from a checkpoint.

    Raises:
        SourceError: a source cannot be opened, or streamed sources are mixed with others.
    """
    sources = [open_source(source, config.seed) for source in config.sources]
    assembler = Assembler(config, tokenizer, image_size)
    workers = config.num_workers
    common = {
        "generator": torch.Generator(),  # the default would draw from the generator that dropout uses
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
        "prefetch_factor": 4 if workers else None,
    }
    streams = [source for source in sources if isinstance(source, StreamSource)]
    if not streams:
        maps = cast(list[MapSource], sources)
        order = MapOrder(maps, assembler, shard, start_step)
        pairs = MapPairs(maps, assembler)
        return iter(DataLoader(pairs, sampler=order, batch_size=None, **common))  # type: ignore[arg-type]
    if len(streams) < len(sources):
        raise SourceError("data.sources mixes streamed sources with others; set streaming: true on all of them or none")
    stream = StreamPairs(streams, assembler, shard, positions, start_step)
    return iter(DataLoader(stream, batch_size=None, **common))  # type: ignore[arg-type]



def training_captions(config: DataConfig) -> Iterator[str]:
    """Yield every caption of the sources, in stored order: what a tokenizer is trained on."""
    for one in config.sources:
        source = open_source(one, config.seed)
        rows = source.captions() if isinstance(source, StreamSource) else _in_parts(source)
        for captions in rows:
            for texts in captions.values():
                yield from texts


def _in_parts(source: MapSource, size: int = 1_000) -> Iterator[dict[str, list[str]]]:
    for start in range(0, len(source), size):
        yield from source.captions(range(start, min(start + size, len(source))))
