"""What a data format is: one file in this folder whose `FORMATS` says how it is opened.

To add a format, add a file with `FORMATS = {"name": Format(open_it, suffixes=(".ending",))}`. Nothing else changes: the
file is found here, `data.sources[].format` takes the new name, and `auto` takes the new suffixes.
"""

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from koclip import installation
from koclip.config import SourceConfig

installation.require("data")
import datasets  # noqa: E402

LISTS = (datasets.List, datasets.LargeList)
_BATCH = 256  # rows read at a time

Captions = dict[str, list[str]]
Table: TypeAlias = datasets.Dataset | datasets.IterableDataset


class Row(NamedTuple):
    """One undecoded sample: captions by language, a key that finds it again, its class.

    Captions are cleaned and keep their places, "" where there is no usable one (`koclip.text.normalize.usable` leaves
    these out): languages with equally many places correspond to each other. A language without any is left out.
    """

    image: bytes | Path | npt.NDArray[np.uint8] | None
    captions: Captions
    key: str
    label: str | None = None


class Skip(NamedTuple):
    """A sample that is left out, and why."""

    key: str
    reason: str
    source: str = ""


class Source(Protocol):
    """Rows in a fixed order."""

    config: SourceConfig

    @property
    def size(self) -> int | None:
        """Number of rows; None if it is not known before they are read."""

    def iter_rows(self, images: bool = True) -> Iterator[Row]:
        """Yield every row in stored order. Without `images` only the captions count; the rest may be missing."""


class MapSource(ABC):
    """Rows by index. Rows `k * group ... k * group + group - 1` belong together, in one batch where it has room."""

    config: SourceConfig
    group = 1
    stored = True  # False: rows are made anew each time, and cannot change
    left_out: Sequence[Skip] = ()  # files of the source that are no rows

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Return these rows, in this order; without images if they are not asked for."""

    def captions(self, indices: Sequence[int]) -> list[Captions]:
        """Return these rows' captions without touching the images."""
        return [row.captions for row in self.rows(indices, images=False)]

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self)

    def iter_rows(self, images: bool = True) -> Iterator[Row]:
        """Yield every row in stored order."""
        for start in range(0, len(self), _BATCH):
            yield from self.rows(range(start, min(start + _BATCH, len(self))), images)


class Format(NamedTuple):
    """How a format is opened.

    `open` takes the source and the seed of `scenes`, and returns a table of `datasets` (its rows hold the columns that
    the source names, images not decoded) or a source of its own.
    """

    open: Callable[[SourceConfig, int], "Table | MapSource"]
    suffixes: tuple[str, ...] = ()  # of its files, which `format: auto` knows it by
    encoded: bool = False  # its text may be in any encoding: `data.sources[].encoding`
    columns: Callable[[SourceConfig], SourceConfig] | None = None  # names the columns, if they are always the same


@functools.cache
def formats() -> dict[str, Format]:
    """Return every format by its name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {name: entry for module in modules for name, entry in getattr(module, "FORMATS", {}).items()}


@functools.cache
def formats_by_suffix() -> dict[str, str]:
    """Return the name of the format of files with each suffix, in lower case."""
    return {suffix: name for name, entry in formats().items() for suffix in entry.suffixes}


def dig(record: Any, column: str) -> Any:
    """Return a column of a record, None if it has none; dots reach into nested records and lists of records."""
    if isinstance(record, (list, tuple)):
        return [dig(item, column) for item in record]
    if not isinstance(record, Mapping):
        return None
    if column in record:
        return record[column]
    top = top_column(record, column)
    return None if top == column else dig(record[top], column[len(top) + 1 :])


def top_column(record: Mapping[str, Any], column: str) -> str:
    """Return the part of a dotted column name that is a key of `record`: columns may have dots in their names."""
    parts = column.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in record), column)


def has_column(feature: Any, column: str) -> bool:
    """Tell whether a table with these features, or such a record, has a column; JSON may hold anything."""
    if isinstance(feature, LISTS):
        return has_column(feature.feature, column)
    if isinstance(feature, list):
        return any(has_column(item, column) for item in feature)
    if not isinstance(feature, Mapping):
        return isinstance(feature, datasets.Json)
    top = top_column(feature, column)
    return top in feature and (top == column or has_column(feature[top], column[len(top) + 1 :]))


def column_names(feature: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the columns in these features, or in such a record."""
    if isinstance(feature, LISTS):
        yield from column_names(feature.feature, prefix)
    elif isinstance(feature, list) and feature and isinstance(feature[0], Mapping):
        yield from column_names(feature[0], prefix)
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from column_names(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix
