"""A run's directory: its settings, its logs, and the record of the samples that it reads."""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from koclip import distributed, storage
from koclip.config import ConfigError, DataConfig, dump
from koclip.data.batches import Batch, Position
from koclip.data.sources import MapSource, Skip, StreamSource, open_source
from koclip.data.survey import BLOCK, Survey, join, look
from koclip.storage import environment
from koclip.training import Event
from koclip.training.pictures import TrainingPictures


class RunDirectory:
    """Writes `config.yaml`, `environment.json`, `metrics.jsonl`, `events.jsonl` and `skipped.jsonl` of a run.

    Only the first process writes. The default of `output_dir` is runs/<recipe>-<date and time>. With `resume`, the
    directory may already hold a run.

    Raises:
        ConfigError: the directory holds a run and `resume` is off, or the directory cannot be created.
    """

    def __init__(self, recipe: str, output_dir: str | None, resume: bool) -> None:
        self._began = time.monotonic()
        self._seconds_before: float | None = 0.0  # time of the run before this process; None: not logged
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(distributed.gather_objects(output_dir or f"runs/{name}")[0])
        if not resume and (self.path / "checkpoints").exists():
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; add --resume auto to continue it, or name another path"
            )
        distributed.barrier()
        try:
            (self.path / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.path} cannot be created: {error.strerror}; name a directory that you may write to"
            ) from error
        self._skipped = {item["key"] for item in storage.read_lines(self.path / "skipped.jsonl")}

    def begin(self, config: Any, step: int) -> None:
        """Write `config.yaml` and `environment.json`, unless the run is finished at `step`."""
        if distributed.rank() != 0:
            return
        storage.keep_lines(self.path / "skipped.jsonl", lambda _: True)  # removes an incomplete last line
        if step < config.train.num_steps:
            dump(config, self.path / "config.yaml")
            facts = {**environment(distributed.world_size()), "fast": config.train.fast}
            storage.replace_text(self.path / "environment.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        kept = [line for line in storage.read_lines(self.path / "metrics.jsonl") if line["step"] <= step]
        self._seconds_before = kept[-1].get("seconds") if kept else 0.0

    def rewind(self, step: int) -> None:
        """Remove the lines that were logged after `step`; the run will log them again."""
        if distributed.rank() == 0:
            for name in ("metrics.jsonl", "events.jsonl"):
                storage.keep_lines(self.path / name, lambda item: item["step"] <= step)

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Append one line to metrics.jsonl. Values that are not finite become null.

        `seconds` is the wall-clock time of the whole run so far. Time after the last checkpoint of a killed process is
        not counted. A run that an older koclip started has no `seconds`.
        """
        if distributed.rank() == 0:
            finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
            if self._seconds_before is not None:
                finite = {"seconds": round(self._seconds_before + time.monotonic() - self._began, 3), **finite}
            storage.append_lines(self.path / "metrics.jsonl", [{"step": step, **finite}])

    def list_events(self, events: list[Event]) -> None:
        """Append bad steps and loss spikes to events.jsonl, with their samples, and print them."""
        if distributed.rank() != 0 or not events:
            return
        # JSON has no nan: these numbers are strings.
        items = [event._asdict() | {"loss": str(event.loss), "grad_norm": str(event.grad_norm)} for event in events]
        storage.append_lines(self.path / "events.jsonl", items)
        for event in events:
            numbers = f"loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}"
            tqdm.write(f"Step {event.step}: {event.kind.replace('_', ' ')}, {numbers} (events.jsonl)")

    def list_skipped(self, skipped: Iterable[Skip]) -> None:
        """Append samples to skipped.jsonl, each once. Any process may call it."""
        new = {skip.key: skip for skip in skipped if skip.key not in self._skipped}
        self._skipped.update(new)
        if new:
            storage.append_lines(self.path / "skipped.jsonl", [skip._asdict() for skip in new.values()])

    def list_left_out(self, source: MapSource | StreamSource) -> None:
        """List what is in a source but is not a row, such as failed downloads; the first process prints how many."""
        if distributed.rank() != 0 or not (left_out := list(source.left_out)):
            return
        self.list_skipped(left_out)
        counts = Counter(skip.reason.partition(": ")[0] for skip in left_out)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        tqdm.write(f"{source.config.short_name}: {len(left_out):,} entries have no row (skipped.jsonl): {reasons}")

    def list_everyones_skipped(self, skipped: list[Skip]) -> None:
        """Append the samples that any process has skipped to skipped.jsonl, each once. Call it on every process."""
        gathered = [skip for part in distributed.gather_objects(skipped) for skip in part]
        if distributed.rank() == 0:
            self.list_skipped(gathered)
        self._skipped.update(skip.key for skip in gathered)


_MIN_DRAWN = 1_000  # rows drawn before the share of skipped rows is checked


class SkippedError(ConfigError):
    """Too many samples could not be used."""


class Samples:
    """Records the samples that this process reads: skipped samples, images, and positions in streamed sources.

    `begins` is whether the run is at its first step.
    """

    def __init__(self, directory: RunDirectory, begins: bool) -> None:
        self._directory = directory
        self._pictures = TrainingPictures(directory.path, begins)
        self._unlisted: list[Skip] = []  # skipped, but not yet in skipped.jsonl
        self._num_skipped = self._num_drawn = 0
        self.positions: dict[int, Position] = {}  # by reader

    def watch(self, batches: Iterator[Batch], max_skipped_fraction: float) -> Iterator[Batch]:
        """Yield the batches unchanged; record their skipped samples, their images and the positions of the readers.

        A run of one process lists skipped samples at once. Several processes list them together, in `list_skipped`.

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
        """List the samples that any process has skipped since the last call. Call it on every process."""
        self._directory.list_everyones_skipped(self._unlisted)
        self._unlisted = []

    def save(self) -> None:
        """Write the files in the run directory, for a checkpoint. Call it on every process."""
        self.list_skipped()
        self._pictures.write()

    def _stop(self, batch: Batch, max_skipped_fraction: float) -> None:
        self._directory.list_skipped(self._unlisted)  # without waiting for the other processes
        file = self._directory.path / "skipped.jsonl"
        last = "\n".join(f"  {skip.key}: {skip.reason}" for skip in batch.skipped[-10:])
        raise SkippedError(
            f"data.max_skipped_fraction: {self._num_skipped} of {self._num_drawn} samples could not be used, expected "
            f"at most {max_skipped_fraction:.0%}; {file} lists them, correct them or raise the limit; the last:\n{last}"
        )


def survey_sources(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory | None = None
) -> list[Survey]:
    """Read the captions of every source once: their lengths in tokens, and facts that identify the data.

    `directory` lists what the sources leave out. Call it on every process. Each process reads its share of the rows.

    Raises:
        SourceError: a source cannot be opened.
    """
    surveys = []
    rank, world_size = distributed.rank(), distributed.world_size()
    for source_config in config.sources:
        source = open_source(source_config, config.seed)
        if directory is not None:
            directory.list_left_out(source)
        blocks = look(source, config, tokenizer, rank, world_size)
        # The bar appears after five seconds.
        options: dict[str, Any] = {"unit": " rows", "unit_scale": BLOCK * world_size, "delay": 5, "disable": rank > 0}
        own = list(tqdm(blocks, f"reading the captions of {source_config.short_name}", **options))
        gathered = itertools.chain(*distributed.gather_objects(own))
        surveys.append(join(source, config, tokenizer, list(gathered)))
    return surveys
