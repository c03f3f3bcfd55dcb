"""Data formats. A file in this folder defines formats in its dictionary `FORMATS`.

To add a format, add a file with `FORMATS = {"name": Format(open_it, suffixes=(".ending",))}`. Nothing else changes:
`data.sources[].format` then accepts the name, and `auto` the suffixes.
"""

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

RowCaptions = dict[str, list[str]]
Table: TypeAlias = datasets.Dataset | datasets.IterableDataset


class Row(NamedTuple):
    """One undecoded sample: image, captions by language, a key that identifies it, and its class.

    Captions are clean and keep their positions; "" stands for an unusable caption (see `koclip.text.normalize.usable`).
    If two languages have equally many, their captions correspond. A language without usable captions is absent.
    """

    image: bytes | Path | npt.NDArray[np.uint8] | None
    captions: RowCaptions
    key: str
    label: str | None = None


class Skip(NamedTuple):
    """A skipped sample, and the reason."""

    key: str
    reason: str
    source: str = ""


class Source(Protocol):
    """Rows in a fixed order."""

    config: SourceConfig

    @property
    def size(self) -> int | None:
        """Number of rows; None if it is unknown before they are read."""

    def iter_rows(self, images: bool = True) -> Iterator[Row]:
        """Yield every row in stored order. Without `images`, only the captions are complete."""


class MapSource(ABC):
    """Rows by index. Rows `k * group ... k * group + group - 1` go into the same batch if possible."""

    config: SourceConfig
    group = 1
    stored = True  # False: rows are generated, and cannot change
    left_out: Iterable[Skip] = ()  # what is in the source, but is not a row

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Return these rows, in this order; without `images`, their images may be missing."""

    def captions(self, indices: Sequence[int]) -> list[RowCaptions]:
        """Return the captions of these rows without reading images."""
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
    """A data format.

    `open` takes the source and the seed of `scenes`. It returns a table of `datasets` with the columns that the source
    names and undecoded images, or a `MapSource`.
    """

    open: Callable[[SourceConfig, int], "Table | MapSource"]
    suffixes: tuple[str, ...] = ()  # `format: auto` detects the format by them
    encoded: bool = False  # its text may have any encoding: `data.sources[].encoding`
    columns: Callable[[SourceConfig], SourceConfig] | None = None  # sets the names of columns that are always the same
    left_out: Callable[[SourceConfig], Iterable[Skip]] | None = None  # what is in a source, but is not a row


@functools.cache
def formats() -> dict[str, Format]:
    """Return every format by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {name: entry for module in modules for name, entry in getattr(module, "FORMATS", {}).items()}


@functools.cache
def formats_by_suffix() -> dict[str, str]:
    """Return the name of the format for each suffix, in lower case."""
    return {suffix: name for name, entry in formats().items() for suffix in entry.suffixes}


def dig(record: Any, column: str) -> Any:
    """Return a column of a record, None if it is missing; dots reach into nested records and lists of records."""
    if isinstance(record, (list, tuple)):
        return [dig(item, column) for item in record]
    if not isinstance(record, Mapping):
        return None
    if column in record:
        return record[column]
    top = top_column(record, column)
    return None if top == column else dig(record[top], column[len(top) + 1 :])


def top_column(record: Mapping[str, Any], column: str) -> str:
    """Return the longest beginning of a dotted name that is a key of `record`: names of columns may contain dots."""
    parts = column.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in record), column)


def has_column(feature: Any, column: str) -> bool:
    """Return whether features of a table, or a record, have a column; JSON may contain any."""
    if isinstance(feature, LISTS):
        return has_column(feature.feature, column)
    if isinstance(feature, list):
        return any(has_column(item, column) for item in feature)
    if not isinstance(feature, Mapping):
        return isinstance(feature, datasets.Json)
    top = top_column(feature, column)
    return top in feature and (top == column or has_column(feature[top], column[len(top) + 1 :]))


def column_names(feature: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the columns in features of a table, or in a record."""
    if isinstance(feature, LISTS):
        yield from column_names(feature.feature, prefix)
    elif isinstance(feature, list) and feature and isinstance(feature[0], Mapping):
        yield from column_names(feature[0], prefix)
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from column_names(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix
