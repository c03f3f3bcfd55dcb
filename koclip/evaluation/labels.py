"""Read class labels: keys or numbers, the same in all parts of an evaluation set.

A number is a class's index in the list, from 0. The data do not say so: they may count from 1, or number the classes of
a longer list. So `labels: auto` accepts numbers only if every class of the list has an image.
"""

import re
from collections.abc import Mapping, Sequence

from koclip.config import ConfigError, EvalSetConfig
from koclip.data.sources import Row
from koclip.text.classes import ClassName
from koclip.text.normalize import normalize

NAMED = 10  # the most classes or rows in a message
_NUMBER = re.compile("0|[1-9][0-9]*")  # 007 is an id
_NUMERAL = re.compile(r"[+-]?\d+(\.\d*)?")  # a key that may be a number
_FIRST = 3  # classes in a note


def read_labels(
    parts: Mapping[str, Sequence[Row]], classes: Sequence[ClassName], config: EvalSetConfig
) -> tuple[str, dict[str, list[int]]]:
    """Return "key" or "number", the kind of the labels, and by part of the set each row's index in the list.

    `parts` has the rows by part of the set: `source`, `train`, `shifted.<name>`. `config.labels` chooses the kind.

    Raises:
        ConfigError: a label is not in the list, or `auto` cannot tell whether numbers are indices.
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
    if missing:  # if the others are numbers, report the label that is no number
        odd = (pair for pair in missing if not known and not _NUMBER.fullmatch(pair[0]))
        label, where = next(odd, missing[0])
        near = [key for key in keys if key.casefold() == label.casefold()]
        likely = f"; {near[0]!r} differs in letter case only" if near else ""
        raise ConfigError(
            f"eval.sets[].classes: {config.classes} has no class {label!r} of image {where}{likely}; its keys are "
            f"{few(list(keys))}: add the class, or choose another column than source.label: {config.source.label}; the "
            "labels of a set are all keys or all numbers"
        )
    return "number" if by_number else "key", {part: [keys[label] for label in own] for part, own in labels.items()}


def _check_numbers(labels: Mapping[str, list[str]], keys: Sequence[str], config: EvalSetConfig) -> None:
    """Check that the numbers can only be indices in the list."""
    places = {str(place) for place in range(len(keys))}
    for part, own in labels.items():
        absent, beyond = (sorted(some, key=int) for some in (places - set(own), set(own) - places))
        why = ""
        if any(_NUMERAL.fullmatch(key) for key in keys):
            why = f"the keys are different numbers: {few(keys)}"
        elif beyond:
            why = f"the list has {len(keys)} classes, so {few(beyond)} of {part} is too large"
        elif absent:
            why = f"{few(absent)} of the list's {len(keys)} has no image in {part}, so numbers may mean other classes"
        if why:
            raise ConfigError(
                f"eval.sets[].labels: {config.source.label} has numbers and no key of {config.classes}; {why}. Set "
                f"source.label to a column of keys; or, if a number is a class's index in that list, from 0 "
                f"({numbering(keys)}), set labels: number"
            )


def numbering(keys: Sequence[str]) -> str:
    """Return what the first and the last numbers mean: 0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck."""
    pairs = [f"{number} = {key}" for number, key in enumerate(keys)]
    return ", ".join(pairs if len(pairs) <= _FIRST + 1 else [*pairs[:_FIRST], "...", pairs[-1]])


def few(names: Sequence[str]) -> str:
    """Return the first `NAMED` names of a list."""
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
