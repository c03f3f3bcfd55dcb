"""Which class each label names: by key or by number, in the same way everywhere in an evaluation set.

A number is a class's place in the list, from 0. Nothing in the data says so: a data set may count from 1, or number the
classes of a longer list. So numbers are accepted on their own only where each place of the list has an image.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from koclip.config import ConfigError, EvalSetConfig
from koclip.data.sources import Row
from koclip.text.classes import ClassName
from koclip.text.normalize import normalize

NAMED = 10  # classes or rows that a message names at most
_NUMBER = re.compile("0|[1-9][0-9]*")  # 007 is an id
_NUMERAL = re.compile(r"[+-]?\d+(\.\d*)?")  # a key that may be meant as a number
_FIRST = 3  # classes that a note names


def read_labels(
    parts: Mapping[str, Sequence[Row]], classes: Sequence[ClassName], config: EvalSetConfig
) -> tuple[str, dict[str, list[int]]]:
    """Return "key" or "number", how classes are named, and each row's place in the list, by part of the set.

    Args:
        parts: Rows that have a label, by part of the set: `source`, `train`, `shifted.<name>`.
        classes: All classes of the list.
        config: The set's: `labels` says which way, `auto` takes the one that fits.

    Raises:
        ConfigError: some labels fit and others do not, or numbers may not be places in the list.
    """
    keys = {name.key: place for place, name in enumerate(classes)}
    labels = {part: [normalize(row.label or "") for row in rows] for part, rows in parts.items()}
    known = any(label in keys for own in labels.values() for label in own)
    numbered = all(_NUMBER.fullmatch(label) for own in labels.values() for label in own)
    by_number = config.labels == "number" or (config.labels == "auto" and numbered and not known)
    if by_number:
        if config.labels == "auto":
            _check_numbers(labels, list(keys), config)
        keys = {str(place): place for place in range(len(classes))}
        labels = {part: [label.lstrip("0") or label[-1:] for label in own] for part, own in labels.items()}
    missing = [
        (label, f"{row.key} ({part})")
        for part, own in labels.items()
        for row, label in zip(parts[part], own, strict=True)
        if label not in keys
    ]
    if missing:  # among numbers, the label that is not a number is named
        _refuse(
            *next((pair for pair in missing if not known and not _NUMBER.fullmatch(pair[0])), missing[0]), keys, config
        )
    return "number" if by_number else "key", {part: [keys[label] for label in own] for part, own in labels.items()}


def _check_numbers(labels: Mapping[str, list[str]], keys: Sequence[str], config: EvalSetConfig) -> None:
    """Make sure that the numbers can only be places in the list."""
    places = {str(place) for place in range(len(keys))}
    for part, own in labels.items():
        absent, beyond = (sorted(some, key=int) for some in (places - set(own), set(own) - places))
        why = ""
        if any(_NUMERAL.fullmatch(key) for key in keys):
            why = f"the keys are numbers, too, but others: {few(keys)}"
        elif beyond:
            why = f"the list has {len(keys)} classes, and {few(beyond)} of {part} is behind its end"
        elif absent:
            why = f"{few(absent)} of the list's {len(keys)} has no image in {part}: it may be numbered in another way"
        if why:
            raise ConfigError(
                f"eval.sets[].labels: {config.source.label} holds numbers and no key of {config.classes}; {why}. Name "
                f"a column that holds keys in source.label; or, if a number is a class's place in that list, from 0 "
                f"({numbering(keys)}), set labels: number"
            )


def _refuse(label: str, where: str, keys: Mapping[str, int], config: EvalSetConfig) -> NoReturn:
    near = [key for key in keys if key.casefold() == label.casefold()]
    likely = f"; it is {near[0]!r}, except for the letter case" if near else ""
    raise ConfigError(
        f"eval.sets[].classes: {config.classes} has no class {label!r} of image {where}{likely}; its keys are "
        f"{few(list(keys))}: add the class, or name another column than source.label: {config.source.label}; the "
        "labels of a set are all keys, or all numbers"
    )


def numbering(keys: Sequence[str]) -> str:
    """Return what the first and the last number stand for: 0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck."""
    pairs = [f"{number} = {key}" for number, key in enumerate(keys)]
    return ", ".join(pairs if len(pairs) <= _FIRST + 1 else [*pairs[:_FIRST], "...", pairs[-1]])


def few(names: Sequence[str]) -> str:
    """Return the first names of a list that may be long."""
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
