"""One training run's directory: its settings, and the logs that are written line by line."""

import json
import math
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from koclip import distributed, storage
from koclip.config import ConfigError, dump
from koclip.data.sources import Skip
from koclip.storage import environment
from koclip.training import Event


class RunDirectory:
    """`config.yaml`, `environment.json`, `metrics.jsonl`, `events.jsonl` and `skipped.jsonl` of a run.

    Only the first process writes.

    Args:
        recipe: The recipe's name, for the default directory.
        output_dir: The directory; default: runs/<recipe>-<date and time>.
        resume: Whether the directory may hold a run already.

    Raises:
        ConfigError: the directory holds a run and `resume` is off, or it cannot be created.
    """

    def __init__(self, recipe: str, output_dir: str | None, resume: bool) -> None:
        self._began = time.monotonic()
        self._seconds_before: float | None = 0.0  # of earlier processes of the run; None: their log does not say
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(distributed.gather_objects(output_dir or f"runs/{name}")[0])
        if not resume and (self.path / "checkpoints").exists():
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; pass --resume auto to continue it, or another directory"
            )
        distributed.barrier()
        try:
            (self.path / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.path} cannot be created: {error.strerror}; expected a folder that may be written"
            ) from error
        self._skipped = {item["key"] for item in storage.read_lines(self.path / "skipped.jsonl")}

    def begin(self, config: Any, step: int) -> None:
        """Write `config.yaml` and `environment.json`, unless the run is finished at `step`."""
        if distributed.rank() != 0:
            return
        storage.keep_lines(self.path / "skipped.jsonl", lambda _: True)  # without a last line that was cut off
        if step < config.train.num_steps:  # a finished run keeps the settings it was trained with
            dump(config, self.path / "config.yaml")
            facts = {**environment(distributed.world_size()), "fast": config.train.fast}
            text = json.dumps(facts, indent=2, ensure_ascii=False)
            storage.replace_text(self.path / "environment.json", text + "\n")
        kept = [line for line in storage.read_lines(self.path / "metrics.jsonl") if line["step"] <= step]
        self._seconds_before = kept[-1].get("seconds") if kept else 0.0

    def rewind(self, step: int) -> None:
        """Remove what was logged after `step`: the run will log it again."""
        if distributed.rank() == 0:
            for name in ("metrics.jsonl", "events.jsonl"):
                storage.keep_lines(self.path / name, lambda item: item["step"] <= step)

    def log(self, step: int, stats: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; values that are not finite are null.

        Its `seconds` are the wall-clock time of the whole run so far. Time after the last checkpoint of a killed
        process is not counted. A run that an older koclip began has no `seconds`.
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
        # JSON knows no nan: these numbers are strings.
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

    def list_everyones_skipped(self, skipped: list[Skip]) -> None:
        """Append the samples that all processes have skipped to skipped.jsonl, each once; all of them call it."""
        everyones = [skip for part in distributed.gather_objects(skipped) for skip in part]
        if distributed.rank() == 0:
            self.list_skipped(everyones)
        self._skipped.update(skip.key for skip in everyones)
