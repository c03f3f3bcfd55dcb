"""One training run's directory and what is written to it."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from koclip import distributed, storage
from koclip.config import ConfigError, TokenizerConfig, check_changes, check_data, dump, to_dict
from koclip.data.batches import Batch, Position
from koclip.data.sources import Skip
from koclip.data.survey import Survey
from koclip.models.save import publish
from koclip.runs import state
from koclip.runs.series import Series
from koclip.storage import environment
from koclip.text.tokenizers import load as load_tokenizer
from koclip.text.tokenizers import train_bpe
from koclip.training import Event, Trainer
from koclip.training.pictures import TrainingPictures

_PROBES = 300  # captions that a tokenizer is tried on
_MIN_DRAWN = 1_000  # rows drawn before the skipped share is judged


class SkippedError(ConfigError):
    """Too many samples were unusable."""


class Run:
    """One training run's directory.

    Args:
        recipe: The recipe's name, for the default directory.
        output_dir: The directory; default: runs/<recipe>-<date and time>.
        resume: Go on from the newest checkpoint in it.

    Raises:
        ConfigError: the directory holds a run and `resume` is off.
    """

    def __init__(self, recipe: str, output_dir: str | None, resume: bool) -> None:
        self._began = time.monotonic()
        self._before: float | None = 0.0  # seconds of the processes before this one; None: their log does not say
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(distributed.gather_objects(output_dir or f"runs/{name}")[0])
        if not resume and (self.path / "checkpoints").exists():
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; pass --resume auto to go on with it, or another one"
            )
        distributed.barrier()
        try:
            (self.path / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"{self.path} cannot be made: {error.strerror}; expected a folder that may be written"
            raise ConfigError(f"output_dir: {told}") from error
        self._series = Series(self.path / "checkpoints")
        self.positions: dict[int, Position] = {}
        self._data: list[dict[str, Any]] = []
        self._skipped = {item["key"] for item in storage.read_lines(self.path / "skipped.jsonl")}
        self._unlisted: list[Skip] = []  # this process's, since the processes last met
        self.num_skipped = self._drawn = 0

    def start(self, config: Any, accelerator: Accelerator) -> None:
        """Find the checkpoint to go on from, write config.yaml and environment.json, and start the tracker.

        Raises:
            ConfigError: `config` differs from the checkpoint's in what would change the result.
            RunError: there are checkpoints, but none is intact.
        """
        self._accelerator, self._config = accelerator, to_dict(config)
        found = self._series.newest_intact() if distributed.rank() == 0 else None
        self._checkpoint = distributed.gather_objects(found)[0]
        if self._checkpoint is not None:
            self._check_changes(state.read_facts(self._checkpoint), config.resume_with)
        self._pictures = TrainingPictures(self.path, begins=self._checkpoint is None)
        accelerator.project_configuration.logging_dir = str(self.path)
        accelerator.init_trackers("tracker")
        if distributed.rank() == 0:
            storage.keep_lines(self.path / "skipped.jsonl", lambda _: True)  # but a line that was cut off
            step = self.step
            if step < config.train.num_steps:  # a finished run keeps what it was trained with
                dump(config, self.path / "config.yaml")
                facts = json.dumps(environment(distributed.world_size()), indent=2, ensure_ascii=False)
                storage.replace_text(self.path / "environment.json", facts + "\n")
            kept = [line for line in storage.read_lines(self.path / "metrics.jsonl") if line["step"] <= step]
            self._before = kept[-1].get("seconds") if kept else 0.0

    def tokenizer(
        self, config: TokenizerConfig, captions: Iterator[str], encoder: PreTrainedConfig | None = None
    ) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer: the one it began with, the one that `config` names, or one trained now.

        It is kept in tokenizer/, so that a resumed run reads the same ids.

        Args:
            config: What is asked for.
            captions: What one is trained on, or tried on.
            encoder: Configuration of the text encoder it belongs to, if that is not CLIP's own.
        """
        directory = self.path / "tokenizer"
        if distributed.rank() == 0 and not directory.exists():
            if config.path is not None:
                probes = list(itertools.islice(captions, _PROBES))
                made = load_tokenizer(config.path, config.max_tokens, encoder, probes)
            else:
                made = train_bpe(
                    itertools.islice(captions, config.train_captions), config.vocab_size, config.max_tokens
                )
            partial = directory.with_name("writing-tokenizer")
            made.save_pretrained(partial)
            partial.rename(directory)
        distributed.barrier()
        return load_tokenizer(str(directory), config.max_tokens, encoder, probes=())  # tried when it was made

    def check_data(self, surveys: Sequence[Survey]) -> None:
        """Keep what tells changed data in every checkpoint, and compare it with the one to go on from.

        Raises:
            ConfigError: the data has changed, and `resume_with` does not name `data.sources`.
        """
        self._data = [one.facts for one in surveys]
        if self._checkpoint is None:
            return
        changed = check_data(state.read_facts(self._checkpoint).get("data"), self._data, self._config["resume_with"])
        if changed and distributed.rank() == 0:
            tqdm.write("\n  ".join(["Changed since the checkpoint:", *changed]))

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and hand it to the tracker; what is not finite is null in it.

        Its `seconds` are those of the run's processes until then, from their start: what comes before the first step
        and between steps counts. Of a process that was killed they count up to the last line that its checkpoint
        covers: the steps after that are trained again. A run that an older koclip began has none.
        """
        self._list_everyones()
        self._accelerator.log(stats, step=step)
        if distributed.rank() == 0:
            finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
            if self._before is not None:
                finite = {"seconds": round(self._before + time.monotonic() - self._began, 3), **finite}
            storage.append_lines(self.path / "metrics.jsonl", [{"step": step, **finite}])

    def list_events(self, events: list[Event]) -> None:
        """Append bad steps and loss spikes to events.jsonl, with their samples, and say so."""
        if distributed.rank() != 0 or not events:
            return
        # JSON knows no nan: these numbers are strings.
        items = [event._asdict() | {"loss": str(event.loss), "grad_norm": str(event.grad_norm)} for event in events]
        storage.append_lines(self.path / "events.jsonl", items)
        for event in events:
            numbers = f"loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}"
            tqdm.write(f"Step {event.step}: {event.kind.replace('_', ' ')}, {numbers} (events.jsonl)")

    def watch(self, batches: Iterator[Batch], max_skipped_fraction: float) -> Iterator[Batch]:
        """Pass batches on; list their skipped samples in skipped.jsonl and note the readers' positions.

        Several processes list theirs together, whenever something is logged or saved.

        Raises:
            SkippedError: more than `max_skipped_fraction` of the rows drawn could not be used.
            RunError: a checkpoint could not be written.
        """
        for batch in batches:
            self._series.stop_if_failed()
            if batch.position is not None:
                self.positions[batch.position.reader] = batch.position
            self._pictures.add(batch)
            self._drawn += batch.num_drawn
            self.num_skipped += len(batch.skipped)
            self._unlisted += batch.skipped
            if distributed.world_size() == 1:
                self._list_everyones()
            if self._drawn >= _MIN_DRAWN and self.num_skipped > max_skipped_fraction * self._drawn:
                self.list_skipped(self._unlisted)  # the other processes may be far from here
                last = "\n".join(f"  {skip.key}: {skip.reason}" for skip in batch.skipped[-10:])
                raise SkippedError(
                    f"data.max_skipped_fraction: {self.num_skipped} of {self._drawn} samples could not be used, more "
                    f"than {max_skipped_fraction:.0%}; {self.path / 'skipped.jsonl'} lists them, the last are:\n{last}"
                )
            yield batch

    def list_skipped(self, skipped: list[Skip]) -> None:
        """Append samples to skipped.jsonl, each once."""
        new = {skip.key: skip for skip in skipped if skip.key not in self._skipped}
        self._skipped.update(new)
        if new:
            storage.append_lines(self.path / "skipped.jsonl", [skip._asdict() for skip in new.values()])

    def _list_everyones(self) -> None:
        """Append what all processes have skipped to skipped.jsonl, each sample once; all of them call it."""
        everyones = [skip for part in distributed.gather_objects(self._unlisted) for skip in part]
        self._unlisted = []
        if distributed.rank() == 0:
            self.list_skipped(everyones)
        self._skipped.update(skip.key for skip in everyones)

    def save(self, trainer: Trainer, step: int, keep: int, wait: bool = False) -> None:
        """Begin checkpoints/step-<step>/, which will be there whole or not at all; keep the newest `keep`.

        Training waits for a copy in host memory, not for the disk.

        Args:
            trainer: What to save.
            step: Steps done.
            keep: Checkpoints kept.
            wait: Return when it is on disk.

        Raises:
            RunError: this or the last checkpoint could not be written.
        """
        self._list_everyones()
        self._pictures.write()
        partial = self._series.begin(step) if distributed.rank() == 0 else self.path
        partial = distributed.gather_objects(partial)[0]
        progress = state.Progress(step, tuple(self.positions.values()))
        snapshot = state.collect(partial, trainer, progress, {"config": self._config, "data": self._data})
        if distributed.rank() == 0:
            self._series.finish(partial, snapshot.write, keep)
        if wait:
            self._series.wait()
            distributed.barrier()

    @property
    def step(self) -> int:
        """Steps done by the checkpoint that the run goes on from, until it is loaded."""
        return 0 if self._checkpoint is None else int(state.read_facts(self._checkpoint)["step"])

    def load(self, trainer: Trainer, start: int = 0) -> state.Progress:
        """Put the newest intact checkpoint's state into `trainer`; without one, a run or stage begins at `start`."""
        progress = state.read(self._checkpoint, trainer, start) if self._checkpoint else state.Progress(start)
        self._checkpoint = None
        self.positions = {position.reader: position for position in progress.positions}
        if distributed.rank() == 0:
            for name in ("metrics.jsonl", "events.jsonl"):  # without what the run will write again
                storage.keep_lines(self.path / name, lambda item: item["step"] <= progress.step)
        return progress

    def _check_changes(self, facts: dict[str, Any], accepted: Sequence[str]) -> None:
        """Compare this launch with the one that made a checkpoint; say what changed.

        Raises:
            ConfigError: a change that would change the result.
        """
        then, now = facts["num_processes"], distributed.world_size()
        if then != now and any(facts["positions"]):
            raise ConfigError(
                f"resume: the checkpoint was made by {then} processes and this run has {now}; streamed data goes on in "
                f"the same order with {then} only (data in files that are not streamed takes any number)"
            )
        changed = check_changes(facts["config"], self._config, (then, now), accepted)
        if then != now:
            changed.append(f"processes: {then} -> {now}; dropout and patch dropout draw other numbers")
        if changed and distributed.rank() == 0:
            tqdm.write("\n  ".join(["Changed since the checkpoint:", *changed]))

    def save_model(self, trainer: Trainer, processor: ProcessorMixin, write: Callable[..., None] = publish) -> Path:
        """Write model/: what `from_pretrained` of stock transformers loads. fp32, safetensors.

        Args:
            trainer: Its weights, or their average, are published.
            processor: The model's.
            write: Takes directory, model, processor and weights.
        """
        weights = state.weights(trainer)
        if trainer.ema is not None:
            weights = trainer.averaged.state_dict()
        directory = self.path / "model"
        if distributed.rank() == 0:
            partial = directory.with_name("writing-model")
            write(partial, trainer.dual_encoder.model, processor, weights)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        distributed.barrier()
        return directory
