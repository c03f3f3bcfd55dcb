"""The order in which rows are drawn, and the choice of their captions.

The order of map-style sources is a function of (data.seed, step): a run that resumes at a step, or that has another
number of processes but the same global batch, sees the same global batches. Each row has its own seed for all its
random choices.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from koclip.config import DataConfig
from koclip.data.sources import MapSource
from koclip.data.survey import CaptionLengths
from koclip.text.normalize import paired

Word = TypeVar("Word")


class RowDraw(NamedTuple):
    """One row to draw: the numbers of the source, of the row, and of the pass over the data."""

    source: int
    row: int
    epoch: int

    def seed(self, seed: int) -> tuple[int, ...]:
        """Return the seed of all random choices about this row, for `data.seed`."""
        return (seed, self.epoch, self.source, self.row)


def generator(purpose: str, *key: int) -> random.Random:
    """Return a generator that depends only on the arguments, in every process and on every machine."""
    return random.Random(f"{purpose} {key}")


class CaptionChooser:
    """Chooses one caption of a row; with a `teacher_language`, only captions that have a translation in it."""

    def __init__(self, config: DataConfig, teacher_language: str | None = None) -> None:
        self.config, self._teacher_language = config, teacher_language
        self.languages = [source.languages or dict.fromkeys(source.captions, 1.0) for source in config.sources]

    def caption(
        self, captions: Mapping[str, Sequence[str]], source: int, seed: tuple[int, ...]
    ) -> tuple[str, int, str] | None:
        """Return the language, the position and the text of a random caption; None if the row has no usable caption.

        The language is drawn by weight among the languages of the row.
        """
        choice = self.choose(captions, source, seed)
        if choice is None:
            return None
        language, place, rng = choice
        caption = captions[language][place]
        if self.config.word_dropout:
            caption = " ".join(self.keep(caption.split(), rng))
        return language, place, caption

    def choose(
        self, captions: Mapping[str, Sequence[Any]], source: int, seed: tuple[int, ...]
    ) -> tuple[str, int, random.Random] | None:
        """Draw a language and the position of a usable caption; None if there is none.

        The third value is the generator for word dropout.
        """
        weights = self.languages[source]
        places = {name: self._usable(captions, name) for name in captions if weights.get(name)}
        languages = [name for name, own in places.items() if own]
        if not languages:
            return None
        rng = generator("caption", *seed)
        language = rng.choices(languages, [weights[name] for name in languages])[0]
        return language, rng.choice(places[language]), rng

    def _usable(self, captions: Mapping[str, Sequence[Any]], language: str) -> list[int]:
        """Return the positions of captions that may be drawn; with a teacher they must have a translation."""
        own = captions[language]
        taught = own if self._teacher_language is None else captions.get(self._teacher_language, own)
        places = paired(own, taught)
        return [place for place, caption in enumerate(own) if caption] if places is None else places

    def keep(self, words: Sequence[Word], rng: random.Random) -> list[Word]:
        """Drop each word with probability `data.word_dropout`, but keep at least one."""
        return [word for word in words if rng.random() >= self.config.word_dropout] or [rng.choice(words)]


class BatchPart(NamedTuple):
    """This process's part of every global batch of `batch_size * world_size` pairs, in micro-batches."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None  # pairs in a micro-batch; the last one may be smaller

    @property
    def pieces(self) -> list[slice]:
        """The slice of this process's part for each micro-batch."""
        size = self.micro_batch_size or self.batch_size
        return [slice(start, min(start + size, self.batch_size)) for start in range(0, self.batch_size, size)]


class MapOrder(Sampler[list[RowDraw]]):
    """Yields this process's draws from `start_step` on, endlessly, one micro-batch at a time.

    Each epoch has another permutation of the rows, and no row is dropped at its end. Within a pool of `length_pool`
    global batches, groups of rows are sorted by caption length (`lengths`, of every source, from
    `koclip.data.survey`), so that batches need little padding.
    """

    def __init__(
        self,
        sources: Sequence[MapSource],
        chooser: CaptionChooser,
        part: BatchPart,
        start_step: int,
        lengths: Sequence[CaptionLengths | None] = (),
    ) -> None:
        self._sources, self._chooser, self._part, self._start_step = sources, chooser, part, start_step
        self._config, self._lengths = chooser.config, lengths
        self._num_groups = _groups_per_epoch(sources)
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def epoch_size(self) -> int:
        """Number of rows drawn in one pass over the data."""
        return sum(count * source.group for count, source in zip(self._num_groups, self._sources, strict=True))

    def __iter__(self) -> Iterator[list[RowDraw]]:
        batch_size, rank, world_size, _ = self._part
        global_batch = batch_size * world_size
        pool, skip = divmod(self._start_step, self._config.length_pool)
        size = self._config.length_pool * global_batch
        while True:
            draws = self._by_length(self._pool(pool, size))
            starts = self._rng(pool, 1).permutation(range(0, size, global_batch))
            for start in starts[skip:]:
                first = start + rank * batch_size
                for piece in self._part.pieces:
                    yield draws[first : first + batch_size][piece]
            pool, skip = pool + 1, 0

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, *key])

    def _pool(self, pool: int, size: int) -> list[RowDraw]:
        """Return the draws of a pool, in random order."""
        epoch, offset = divmod(pool * size, self.epoch_size)
        draws: list[RowDraw] = []
        while len(draws) < size:
            part = self._epoch(epoch)[offset : offset + size - len(draws)]
            draws += [RowDraw(source, row, epoch) for source, row in part.tolist()]
            epoch, offset = epoch + 1, 0
        return draws

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return (source, row) of every draw of an epoch in random order; rows of a group stay together."""
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1]
        parts = []
        for number, (source, count) in enumerate(zip(self._sources, self._num_groups, strict=True)):
            starts = _starts(len(source), source.group, count, self._rng(epoch, 2, number))
            parts.append(np.stack([np.full_like(starts, number), starts, np.full_like(starts, source.group)], axis=1))
        groups = self._rng(epoch, 3).permutation(np.concatenate(parts))  # (source, first row, rows)
        within = np.concatenate([np.arange(size) for size in groups[:, 2]]) if groups[:, 2].max() > 1 else 0
        rows = np.repeat(groups[:, :2], groups[:, 2], axis=0)
        rows[:, 1] += within
        self._cached = (epoch, rows)
        return rows

    def _by_length(self, draws: list[RowDraw]) -> list[RowDraw]:
        """Sort draws by caption length; rows of a group stay together and count with their longest caption."""
        if self._config.length_pool == 1:
            return draws
        groups = [(draw.source, draw.epoch, draw.row // self._sources[draw.source].group) for draw in draws]
        longest = dict.fromkeys(groups, 0)
        for group, draw in zip(groups, draws, strict=True):
            longest[group] = max(self._length(draw), longest[group])
        order = sorted(range(len(draws)), key=lambda place: (longest[groups[place]], groups[place]))
        return [draws[place] for place in order]

    def _length(self, draw: RowDraw) -> int:
        """Return the length in tokens of the caption that will be chosen; 0 if the row has none."""
        lengths = self._lengths[draw.source]
        assert lengths is not None, "`length_pool` above 1 needs the lengths"
        captions = lengths.row(draw.row)
        choice = self._chooser.choose(captions, draw.source, draw.seed(self._config.seed))
        if choice is None:
            return 0
        language, place, rng = choice
        parts = captions[language][place]
        return lengths.total(self._chooser.keep(parts, rng) if self._config.word_dropout else parts)


def _groups_per_epoch(sources: Sequence[MapSource]) -> list[int]:
    """Return the number of groups per epoch of each source: all groups, or with weights its share of all rows."""
    sizes = [len(source) for source in sources]
    weights = [source.config.weight for source in sources]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    rows = [sum(sizes) * share / sum(shares) for share in shares] if any(weights) else sizes
    return [max(1, round(count / source.group)) for count, source in zip(rows, sources, strict=True)]


def _starts(rows: int, group: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the first rows of `count` groups in random order; no group repeats before all have occurred."""
    starts = np.arange(0, rows, group)
    passes = [rng.permutation(starts) for _ in range(-(-count // len(starts)))]
    return np.concatenate(passes)[:count]
