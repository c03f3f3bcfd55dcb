"""Errors that end a run with one line; checks of values, language codes and file names, and of a resumed run."""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from koclip import storage

MOST_PIXELS = 178_956_970  # PIL decodes no larger picture


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, its value and the fix."""


class RunError(RuntimeError):
    """A run that cannot continue. The message says why, what is saved and what to do."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved a checkpoint. The message says how to continue."""


def peer(package: str, key: str) -> Any:
    """Import a package of the extra `peers`. `key` is the configuration key that needs it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(f"{key}: {package} is not installed ({error}): pip install 'koclip[peers]'") from error


# Errors that a wrong value can cause in the code after a failed check. A `ConfigError` is a `ValueError`.
_CONSEQUENCES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)  # inside `all_faults`


def check(condition: bool, key: str, got: object, fix: str) -> None:
    """Raise a `ConfigError` that names `key` if `condition` is false; in `all_faults`, collect the fault instead."""
    if condition:
        return
    fault, collected = f"{key}: got {got!r}, {fix}", _collected.get()
    if collected is None:
        raise ConfigError(fault)
    collected.append(fault)


def check_least(section: object, prefix: str, least: int, *names: str) -> None:
    """Check that these values of a section are at least `least`, or None; errors put `prefix` before their names."""
    for name in names:
        value = getattr(section, name)
        check(value is None or value >= least, prefix + name, value, f"expected {least} or more")


def check_share(key: str, value: float) -> None:
    """Check that a value is a share below 1."""
    check(0 <= value < 1, key, value, "expected 0 or more and less than 1")


def check_encoding(key: str, name: str) -> None:
    """Check that Python knows an encoding of texts."""
    try:
        "".encode(name)
    except LookupError:
        check(False, key, name, "expected a name such as utf-8, cp949 or utf-16")


@contextmanager
def all_faults() -> Iterator[None]:
    """Raise one `ConfigError` with every fault that `check` finds in the block, not only the first.

    A block inside another block passes its faults to the outer block. An error that follows a fault is not reported:
    it is a consequence of the wrong value.
    """
    outer = _collected.get()
    faults: list[str] = []
    token = _collected.set(faults)
    try:
        yield
    except _CONSEQUENCES as error:
        if not faults:
            raise
        if isinstance(error, ConfigError):  # raised without `check`
            faults.append(str(error))
    finally:
        _collected.reset(token)
    if outer is not None:
        outer += faults
    elif faults:
        faults = list(dict.fromkeys(faults))
        listed = "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults, 1))
        raise ConfigError(faults[0] if len(faults) == 1 else f"{len(faults)} faults: {listed}")


def check_pixels(key: str, pixels: int) -> None:
    """Check the largest allowed width x height of a picture."""
    check(1 <= pixels <= MOST_PIXELS, key, pixels, f"expected 1 to {MOST_PIXELS}, the most that PIL decodes")


_MEANT = {written: code for written, code in storage.read_table("languages.tsv")}
_SHORT = {code: short for code, short in _MEANT.items() if len(code) == 3 and code.isascii()}
# `kr` is the code of Kanuri and `tw` of Twi, but most people who write them mean Korean and Taiwan's Chinese.
_TAKEN = {"kr": "kau for Kanuri", "tw": "twi for Twi"}
# A tag of BCP 47 (RFC 5646): `ko`, `en`, `zh-Hant`, `pt-BR`.
_TAG = re.compile(
    r"([a-z]{2,3})(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?(-([a-z0-9]{5,8}|\d[a-z0-9]{3}))*(-x(-[a-z0-9]{1,8})+)?"
)


def check_languages(key: str, languages: Iterable[str]) -> None:
    """Check that each language is a BCP 47 code in the standard's letter case.

    A code of three letters is refused if the language has a code of two letters.

    Raises:
        ConfigError: a code is wrong. The message suggests the code that is probably meant.
    """
    for language in languages:
        check(isinstance(language, str), key, language, 'expected a text; in YAML, no means false: write "no"')
        meant = _likely(language)
        fix = "expected a BCP 47 language code, such as ko, en, zh-Hant or pt-BR"
        if meant:
            fix += f"; did you mean {meant}?" + (f" (or {_TAKEN[language]})" if language in _TAKEN else "")
        check(_is_code(language), key, language, fix)


def _is_code(language: str) -> bool:
    tag = _TAG.fullmatch(language)
    if tag is None or tag[1] in _TAKEN:
        return False
    return tag[1] in _SHORT.values() if len(tag[1]) == 2 else tag[1] not in _SHORT


def _likely(language: str) -> str:
    """Return the code that a country code, a language name, a longer code or another letter case means; else ""."""
    primary, *others = [part.strip() for part in re.split(r"[-_]", language.casefold())]
    meant = _MEANT.get(primary, primary)
    shaped = [part.upper() if len(part) == 2 else part.title() if len(part) == 4 else part for part in others]
    tag = "-".join([meant, *shaped])
    return tag if _is_code(tag) else meant if _is_code(meant) else ""


def locate(path: str | Path) -> Path:
    """Return the path of the file that has this name in any Unicode form; the path itself if no such file exists.

    macOS writes Korean names decomposed (NFD), most others composed (NFC). If several forms exist, the form in `path`
    is preferred, then NFC, then NFD.
    """
    path = Path(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    place = Path(path.anchor)
    for name in path.parts[1:] if path.anchor else path.parts:
        spelling = _spelling(place, name)
        if spelling is None:
            return path
        place /= spelling
    return place


def _spelling(folder: Path, name: str) -> str | None:
    """Return a name as the folder spells it; None if it has no such entry, or several and none is in NFC or NFD."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if os.path.lexists(folder / form):
            return form
    if name.isascii():
        return None
    try:
        spellings = _listing(str(folder), folder.stat().st_mtime_ns)[unicodedata.normalize("NFC", name)]
    except (OSError, KeyError, ValueError):
        return None
    return spellings[0] if len(spellings) == 1 else None


@lru_cache(maxsize=64)
def _listing(folder: str, changed: int) -> dict[str, list[str]]:
    """Return the entries of a folder by their name in NFC; `changed` is the time of its last change."""
    entries = defaultdict(list)
    for entry in Path(folder).iterdir():
        entries[unicodedata.normalize("NFC", entry.name)].append(entry.name)
    return dict(entries)


# Keys that do not change the trained model. (The loader checks `data.num_workers` if it reads streams.)
FREE = (
    *("output_dir", "resume", "resume_with", "eval", "data.num_workers", "data.max_skipped_fraction"),
    *(
        "align.cache_dir",
        "align.compare_source",
        "loss.tile_rows",
        "model.image_gradient_checkpointing",
        "model.text_gradient_checkpointing",
    ),
    *("train.num_processes", "train.num_threads", "train.micro_batch_size", "train.compile", "train.tracker"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.max_bad_steps"),
    "train.spike_sigmas",
)
_GLOBAL = "global batch (train.batch_size x processes)"


def check_changes(
    before: dict[str, Any], now: dict[str, Any], processes: tuple[int, int], accepted: Sequence[str]
) -> list[str]:
    """Compare the configuration of a checkpoint with that of the resumed run; return a line per changed key.

    `processes` are their numbers before and now: this and the batch size may change if the global batch stays the same.
    `accepted` are keys that may change although the trained model will differ.

    Raises:
        ConfigError: another key changed that changes the trained model, or `accepted` names an unknown key.
    """
    old, new = _flat(before), _flat(now)
    for key in accepted:
        if key not in new:
            raise ConfigError(f"resume_with: got {key!r}, expected a key of this recipe, such as optim.lr")
    for config, count in zip((old, new), processes, strict=True):
        config[_GLOBAL] = config.pop("train.batch_size") * count
    changed = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
    lines = {key: f"{key}: {was} -> {now}" for key, (was, now) in changed.items()}
    named = {*accepted, *([_GLOBAL] if "train.batch_size" in accepted else [])}
    refused = {
        key: line
        for key, line in lines.items()
        if key not in named and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    }
    if refused:
        names = ", ".join("train.batch_size" if key == _GLOBAL else key for key in refused)
        raise ConfigError(
            "resume: these keys changed since the checkpoint, and the trained model would differ: "
            f"{'; '.join(refused.values())}. Restore them, or accept the change: --resume_with '[{names}]'"
        )
    return list(lines.values())


def check_data(
    before: Sequence[dict[str, Any]] | None, now: Sequence[dict[str, Any]], accepted: Sequence[str]
) -> list[str]:
    """Compare the facts about each source in a checkpoint with the resumed run; return a line per changed source.

    `before` is None if the checkpoint has no facts. `accepted` may contain `data.sources`, to allow changes.

    Raises:
        ConfigError: the data changed, and `accepted` does not contain `data.sources`.
    """
    if before is None:
        return ["the checkpoint does not describe its data: koclip cannot check that the data is the same"]
    lines = [_difference(was, new) for was, new in itertools.zip_longest(before, now) if was != new]
    if lines and "data.sources" not in accepted:
        raise ConfigError(
            f"resume: the data changed since the checkpoint: {'; '.join(lines)}. The run would continue with other "
            "rows. Restore the data, or accept the change: --resume_with '[data.sources]'"
        )
    return lines


def _difference(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return how a source differs from the source in the checkpoint."""
    if before is None or now is None:
        source = now or before or {}
        return f"source {source['source']}: {'removed' if now is None else 'new'}"
    numbers = {key: (before.get(key), now.get(key)) for key in ("rows", "shards", "revision")}
    counts = [f"{key}: {was} -> {new}" for key, (was, new) in numbers.items() if was != new]
    what = ", ".join(counts) or "as many rows, but different captions or pictures, or a different order"
    return f"source {now['source']}: {what}"


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one dictionary of dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
