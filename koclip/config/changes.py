"""Which keys of the configuration may differ when a run is resumed."""

import itertools
from collections.abc import Sequence
from typing import Any

from koclip.config.checks import ConfigError

# Keys that do not change the trained model. The number of readers of streamed data changes the order of the rows; it
# is checked where the data is opened.
FREE = (
    *("output_dir", "resume", "resume_with", "eval", "data.num_workers", "data.max_skipped_fraction"),
    "align.cache_dir",
    *("model.image_gradient_checkpointing", "model.text_gradient_checkpointing", "loss.tile_rows"),
    *("train.num_processes", "train.num_threads", "train.micro_batch_size", "train.compile", "train.tracker"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints"),
    *("train.max_bad_steps", "train.spike_sigmas"),
)
_GLOBAL = "global batch (train.batch_size x processes)"


def check_changes(
    before: dict[str, Any], now: dict[str, Any], processes: tuple[int, int], accepted: Sequence[str]
) -> list[str]:
    """Compare the configuration of a checkpoint with that of the resumed run; return a line per changed key.

    Args:
        before: The configuration in the checkpoint, as `to_dict` gives it.
        now: The configuration of the resumed run.
        processes: Number of processes before and now. Both this and the batch size may change if the global batch
            stays the same.
        accepted: Keys that may change although the trained model will differ.

    Raises:
        ConfigError: another key changed that changes the trained model, or `accepted` names an unknown key.
    """
    old, new = _flat(before), _flat(now)
    for key in accepted:
        if key not in new:
            raise ConfigError(f"resume_with: {key} is not a key of this recipe; it takes names such as optim.lr")
    for config, count in zip((old, new), processes, strict=True):
        config[_GLOBAL] = config.pop("train.batch_size") * count
    changed = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
    lines = {key: f"{key}: {was} -> {now}" for key, (was, now) in changed.items()}
    named = {*accepted, *([_GLOBAL] if "train.batch_size" in accepted else [])}
    refused = {key: line for key, line in lines.items() if not _is_free(key) and key not in named}
    if refused:
        names = ", ".join("train.batch_size" if key == _GLOBAL else key for key in refused)
        raise ConfigError(
            "resume: these keys changed since the checkpoint, and the trained model would differ: "
            f"{'; '.join(refused.values())}. Set them back, or accept them by name: --resume_with '[{names}]'"
        )
    return list(lines.values())


def check_data(
    before: Sequence[dict[str, Any]] | None, now: Sequence[dict[str, Any]], accepted: Sequence[str]
) -> list[str]:
    """Compare the data of a checkpoint with the data of the resumed run; return a line per changed source.

    Args:
        before: Facts about each source, from the checkpoint; None if the checkpoint has none.
        now: The same facts about the sources of the resumed run.
        accepted: Keys that may change although the trained model will differ; `data.sources` stands for the data.

    Raises:
        ConfigError: the data changed, and `accepted` does not contain `data.sources`.
    """
    if before is None:
        return ["the checkpoint has no facts about its data: koclip cannot check that the data is the same"]
    lines = [_difference(was, new) for was, new in itertools.zip_longest(before, now) if was != new]
    if lines and "data.sources" not in accepted:
        raise ConfigError(
            f"resume: the data changed since the checkpoint: {'; '.join(lines)}. The rows that come next would be "
            "others. Put the data back, or accept it by name: --resume_with '[data.sources]'"
        )
    return lines


def _difference(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return how a source differs from the source in the checkpoint."""
    if before is None or now is None:
        source = now or before or {}
        return f"source {source['source']}: {'not there' if now is None else 'new'}"
    numbers = {key: (before.get(key), now.get(key)) for key in ("rows", "shards", "revision")}
    counts = [f"{key}: {was} -> {new}" for key, (was, new) in numbers.items() if was != new]
    what = ", ".join(counts) or "same number of rows, but other captions, other pictures or another order"
    return f"source {now['source']}: {what}"


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one dictionary of dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
