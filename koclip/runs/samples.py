"""The samples that a run reads: their captions' lengths, how far its streams are, what it skipped and has seen."""

import itertools
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from koclip import distributed
from koclip.config import ConfigError, DataConfig
from koclip.data.batches import Batch, Position
from koclip.data.sources import Skip, open_source
from koclip.data.survey import BLOCK, Survey, join, look
from koclip.runs.directory import RunDirectory
from koclip.training.pictures import TrainingPictures

_MIN_DRAWN = 1_000  # rows drawn before the skipped share is judged


class SkippedError(ConfigError):
    """Too many samples were unusable."""


class Samples:
    """What one process has read.

    Args:
        directory: Where skipped samples are listed.
        begins: Whether the run is at its first step.
    """

    def __init__(self, directory: RunDirectory, begins: bool) -> None:
        self._directory = directory
        self._pictures = TrainingPictures(directory.path, begins)
        self._unlisted: list[Skip] = []  # since the processes last listed theirs together
        self._num_skipped = self._num_drawn = 0
        self.positions: dict[int, Position] = {}  # by reader

    def watch(self, batches: Iterator[Batch], max_skipped_fraction: float) -> Iterator[Batch]:
        """Pass batches on; record their skipped samples, their images and the positions of the readers.

        One process lists skipped samples at once. Several list theirs together, in `list_skipped`.

        Raises:
            SkippedError: more than `max_skipped_fraction` of the rows drawn could not be used.
        """
        for batch in batches:
            if batch.position is not None:
                self.positions[batch.position.reader] = batch.position
            self._pictures.add(batch)
            self._num_drawn += batch.num_drawn
            self._num_skipped += len(batch.skipped)
            self._unlisted += batch.skipped
            if distributed.world_size() == 1:
                self.list_skipped()
            if self._num_drawn >= _MIN_DRAWN and self._num_skipped > max_skipped_fraction * self._num_drawn:
                self._stop(batch, max_skipped_fraction)
            yield batch

    def list_skipped(self) -> None:
        """List what all processes have skipped since the last call; all of them call it."""
        self._directory.list_everyones_skipped(self._unlisted)
        self._unlisted = []

    def save(self) -> None:
        """Bring the files in the run directory up to date, for a checkpoint; all processes call it."""
        self.list_skipped()
        self._pictures.write()

    def _stop(self, batch: Batch, max_skipped_fraction: float) -> None:
        self._directory.list_skipped(self._unlisted)  # the other processes may be far from here
        file = self._directory.path / "skipped.jsonl"
        last = "\n".join(f"  {skip.key}: {skip.reason}" for skip in batch.skipped[-10:])
        raise SkippedError(
            f"data.max_skipped_fraction: {self._num_skipped} of {self._num_drawn} samples could not be used, more "
            f"than {max_skipped_fraction:.0%}; {file} lists them, the last are:\n{last}"
        )


def survey(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Survey]:
    """Look at every source once; call it on every process.

    Args:
        config: The sources, and what batches are grouped by.
        tokenizer: Measures the captions.

    Raises:
        SourceError: a source cannot be opened.
    """
    surveys = []
    rank, world_size = distributed.rank(), distributed.world_size()
    for source_config in config.sources:
        source = open_source(source_config, config.seed)
        blocks = look(source, config, tokenizer, rank, world_size)
        # The bar appears where it takes longer than five seconds.
        options: dict[str, Any] = {"unit": " rows", "unit_scale": BLOCK * world_size, "delay": 5, "disable": rank > 0}
        mine = list(tqdm(blocks, f"reading the captions of {source_config.short_name}", **options))
        everyone = itertools.chain(*distributed.gather_objects(mine))
        surveys.append(join(source, config, tokenizer, list(everyone)))
    return surveys
