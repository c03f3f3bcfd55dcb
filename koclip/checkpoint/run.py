"""One training run's directory and what is written to it."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from koclip import distributed
from koclip.checkpoint import state
from koclip.checkpoint.environment import environment
from koclip.checkpoint.model import publish
from koclip.config import ConfigError, TokenizerConfig, dump
from koclip.data.batches import Batch, Position, Skip
from koclip.text.tokenizers import load as load_tokenizer
from koclip.text.tokenizers import train_bpe
from koclip.training.loop import Trainer

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
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(distributed.gather_objects(output_dir or f"runs/{name}")[0])
        if not resume and (self.path / "checkpoints").exists():
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; pass --resume auto to go on with it, or another one"
            )
        distributed.barrier()
        self.positions: dict[int, Position] = {}
        listed = self.path / "skipped.jsonl"
        known = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        self._skipped = {json.loads(line)["key"] for line in known}
        self.num_skipped = self._drawn = 0
        (self.path / "pictures").mkdir(parents=True, exist_ok=True)

    def start(self, config: Any, accelerator: Accelerator) -> None:
        """Write config.yaml and environment.json, and start the tracker that `accelerator` was made with."""
        self._accelerator = accelerator
        accelerator.project_configuration.logging_dir = str(self.path)
        accelerator.init_trackers("tracker")
        if distributed.rank() == 0:
            dump(config, self.path / "config.yaml")
            facts = json.dumps(environment(), indent=2, ensure_ascii=False)
            (self.path / "environment.json").write_text(facts + "\n", encoding="utf-8")

    def tokenizer(self, config: TokenizerConfig, captions: Iterator[str]) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer: the one it began with, the one that `config` names, or one trained now.

        It is kept in tokenizer/, so that a resumed run reads the same ids.
        """
        directory = self.path / "tokenizer"
        if distributed.rank() == 0 and not directory.exists():
            if config.path is not None:
                made = load_tokenizer(config.path, config.max_tokens)
            else:
                made = train_bpe(
                    itertools.islice(captions, config.train_captions), config.vocab_size, config.max_tokens
                )
            partial = directory.with_name("writing-tokenizer")
            made.save_pretrained(partial)
            partial.rename(directory)
        distributed.barrier()
        return load_tokenizer(str(directory), config.max_tokens)

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and hand it to the tracker."""
        self._accelerator.log(stats, step=step)
        if distributed.rank() == 0:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **stats}) + "\n")

    def watch(self, batches: Iterator[Batch], max_skipped_fraction: float) -> Iterator[Batch]:
        """Pass batches on; list their skipped samples in skipped.jsonl and note the readers' positions.

        Raises:
            SkippedError: more than `max_skipped_fraction` of the rows drawn could not be used.
        """
        for batch in batches:
            if batch.position is not None:
                self.positions[batch.position.reader] = batch.position
            self._drawn += batch.num_drawn
            self.num_skipped += len(batch.skipped)
            self.list_skipped(batch.skipped)
            if self._drawn >= _MIN_DRAWN and self.num_skipped > max_skipped_fraction * self._drawn:
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
            with (self.path / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(skip._asdict(), ensure_ascii=False) + "\n" for skip in new.values())

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint. One that was being written has another name."""
        found = sorted((self.path / "checkpoints").glob("step-*/state.json"))
        return found[-1].parent if found else None

    def save(self, trainer: Trainer, step: int, keep: int) -> Path:
        """Write checkpoints/step-<step>/ so that it is there whole or not at all; keep the newest `keep`."""
        final = self.path / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(f"writing-{final.name}")
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.barrier()
        state.write(partial, trainer, state.Progress(step, tuple(self.positions.values())))
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync_directory(final.parent)
            for old in sorted(final.parent.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
        distributed.barrier()
        return final

    def load(self, trainer: Trainer) -> state.Progress:
        """Put the newest checkpoint's state into `trainer`; a fresh run starts at step 0."""
        latest = self.latest()
        if latest is None:
            return state.Progress()
        progress = state.read(latest, trainer)
        self.positions = {position.reader: position for position in progress.positions}
        if distributed.rank() == 0:
            self._forget_metrics_after(progress.step)
        return progress

    def _forget_metrics_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that the resumed run will write again."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")

    def save_model(self, trainer: Trainer, processor: ProcessorMixin) -> Path:
        """Write model/: what `from_pretrained` of stock transformers loads. fp32, safetensors."""
        weights = state.weights(trainer)
        if trainer.ema is not None:
            weights = trainer.averaged.state_dict()
        directory = self.path / "model"
        if distributed.rank() == 0:
            publish(directory, trainer.dual_encoder.model, processor, weights)
        distributed.barrier()
        return directory


def _sync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
