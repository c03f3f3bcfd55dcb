"""Open any set of (image, captions) rows: the built-in scenes, or a table that `koclip.data.tables` reads.

A row's image stays bytes or a path until it is drawn.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64_hexdigest

from koclip.config import SourceConfig
from koclip.data import scenes
from koclip.data.tables import UNREADABLE, SourceError, Table, dig, file_format, open_table
from koclip.text.normalize import clean_captions


class Row(NamedTuple):
    """One undecoded sample: captions by language, a key that finds it again, its class.

    Captions are cleaned and keep their places, "" where there is no usable one (`koclip.text.normalize.usable` leaves
    these out): languages with equally many places correspond to each other. A language without any is left out.
    """

    image: bytes | Path | npt.NDArray[np.uint8] | None
    captions: dict[str, list[str]]
    key: str
    label: str | None = None


class MapSource(Protocol):
    """Rows by index. Rows `k * group ... k * group + group - 1` belong together, in one batch where it has room."""

    config: SourceConfig
    group: int

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Return these rows, in this order; without images if they are not asked for."""

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        """Return these rows' captions without touching the images."""


class ScenesSource:
    """The built-in scenes as a map source. `seed` makes another set of scenes.

    Raises:
        SourceError: `captions` names a language that scenes have no captions in.
    """

    group = 2

    def __init__(self, config: SourceConfig, seed: int = 0) -> None:
        unknown = sorted(set(config.captions) - set(scenes.LANGUAGES))
        if unknown:
            raise SourceError(f"source 'scenes' has no captions in {unknown}; its languages are {scenes.LANGUAGES}")
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return self.config.scenes_size

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Draw these scenes."""
        part = self.config.scenes_part
        drawn = [scenes.scene(part, self.seed, index) for index in indices]
        return [
            Row(scenes.draw(scene, index) if images else None, self._choose(scene), f"scenes/{part}/{index}")
            for scene, index in zip(drawn, indices, strict=True)
        ]

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        """Tell these scenes."""
        return [self._choose(scenes.scene(self.config.scenes_part, self.seed, index)) for index in indices]

    def _choose(self, scene: scenes.Scene) -> dict[str, list[str]]:
        told = scenes.captions(scene)
        return {language: told[language] for language in self.config.captions}


class TableSource:
    """A `datasets.Dataset` as a map source. `numbers` are its rows' places in what is stored, if rows were left out."""

    group = 1

    def __init__(self, table: datasets.Dataset, config: SourceConfig, numbers: Sequence[int] | None = None) -> None:
        self.config = config
        self._table, self._numbers = table, numbers
        self._classes = _class_names(table, config)
        columns = [name for name in table.column_names if any(_under(name, c) for c in config.captions.values())]
        self._captions = table.select_columns(columns)

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Read these rows."""
        numbers = indices if self._numbers is None else [self._numbers[index] for index in indices]
        records = _records((self._table if images else self._captions)[list(indices)])
        return [
            row(record, self.config, str(number), self._classes)
            for record, number in zip(records, numbers, strict=True)
        ]

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        """Read these rows' caption columns."""
        return [row_captions(record, self.config) for record in _records(self._captions[list(indices)])]

    def picture_sizes(self) -> pa.ChunkedArray | None:
        """Return how many bytes each row's picture has, without reading one; None where the table holds none."""
        if self.config.image not in self._table.column_names:
            return None
        column = self._table.data.column(self.config.image)
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            return None
        sizes, indices = pc.binary_length(column), self._table._indices  # reads where each begins, no more
        if indices is not None:  # rows were selected
            sizes = sizes.take(indices.column(0))
        return None if sizes.null_count == len(sizes) else sizes


class StreamSource:
    """A `datasets.IterableDataset`: rows in order of arrival, its shards split among readers."""

    def __init__(self, stream: datasets.IterableDataset, config: SourceConfig) -> None:
        self.config = config
        self._stream = stream

    @property
    def num_shards(self) -> int:
        """Number of parts that can be read by different readers."""
        return int(self._stream.num_shards)

    def rows(self, epoch: int, seed: int, buffer_size: int, reader: int, num_readers: int) -> Iterator[Row]:
        """Yield the rows of one pass that belong to `reader`; the order is a function of (seed, epoch, reader).

        Raises:
            SourceError: a shard is broken.
        """
        rng = np.random.default_rng((seed, epoch))  # equal for all readers: they split the same order of shards
        # One shard at a time: reading several takes threads, and seconds to stop them at the end of a pass.
        stream = self._stream.shuffle(generator=rng, buffer_size=buffer_size, max_buffer_input_shards=1)
        if num_readers > 1:
            stream = stream.shard(num_readers, reader, contiguous=False)
        # Read by iter(): iterating the stream itself would split the shards once more over the data loader's workers.
        last = None
        try:
            for columns in stream.iter(batch_size=1):
                for record in _records(columns):
                    last = row(record, self.config)
                    yield last
        except UNREADABLE as error:
            place = f"behind row {last.key}" if last else "at the start of its shards"
            raise SourceError(
                f"source {self.config.path!r} cannot be read on {place}: {type(error).__name__}: {error}; "
                "mend that file or take it out"
            ) from error

    def stored_rows(self) -> Iterator[Row]:
        """Yield every row in stored order."""
        classes = _class_names(self._stream, self.config)
        for record in self._stream:
            yield row(record, self.config, classes=classes)

    def captions(self) -> Iterator[dict[str, list[str]]]:
        """Yield every row's captions in stored order, without the images where the format allows."""
        names = self._stream.column_names or []
        told = [name for name in names if any(_under(name, column) for column in self.config.captions.values())]
        for record in self._stream.select_columns(told) if told else self._stream:
            yield row_captions(record, self.config)


def open_source(config: SourceConfig, seed: int = 0) -> MapSource | StreamSource:
    """Open one source for reading; `seed` is that of `scenes`.

    Raises:
        SourceError: the file, data set or a column named in `config` does not exist, or no row is left.
    """
    if file_format(config) == "scenes":
        return ScenesSource(config, seed)
    if file_format(config) == "annotations":
        config = _annotation_columns(config)
    table = open_table(config)
    wanted = {column: set(values) for column, values in (config.where or {}).items()}

    def matches(record: Mapping[str, Any]) -> bool:
        return all(str(dig(record, column)) in values for column, values in wanted.items())

    if isinstance(table, datasets.IterableDataset):
        return StreamSource(table.filter(matches) if wanted else table, config)
    numbers = None
    if wanted:
        names = [name for name in table.column_names if any(_under(name, column) for column in wanted)]
        numbers = [number for number, record in enumerate(table.select_columns(names)) if matches(record)]
        table = table.select(numbers)
    if len(table) == 0:
        raise SourceError(f"source {config.path!r} has no rows (where: {config.where}); check path, split and where")
    return TableSource(table, config, numbers)


def row(record: Mapping[str, Any], config: SourceConfig, number: str = "", classes: Sequence[str] | None = None) -> Row:
    """Turn one record of a table into a `Row`.

    Its key is made of the source's name, the row's number and name. Rows of a stream have no number; one without a
    name either is known by a hash of its captions. `classes` are the names of numbered labels.
    """
    value = dig(record, config.image) if config.image else None
    captions = row_captions(record, config)
    path = value.get("path") if isinstance(value, Mapping) else value
    name = record.get("__key__") or (Path(path).name if isinstance(path, str) else None) or record.get("id")
    shard = Path(str(record.get("__url__") or "")).name
    if not (name or number):
        name = xxh3_64_hexdigest(repr(captions).encode())
    key = "/".join(filter(None, (config.short_name, shard, number, str(name or ""))))
    label = _label(dig(record, config.label), classes) if config.label else None
    return Row(_image(value, config), captions, key, label)


def _label(value: Any, classes: Sequence[str] | None) -> str | None:
    """Return a label as text, its name where the table has names; None for what means that there is none: NaN, -1."""
    if isinstance(value, float):  # what pandas makes of whole numbers where some are missing
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if classes is not None and isinstance(value, int):
        value = classes[value] if 0 <= value < len(classes) else None
    return None if value is None else str(value)


def _class_names(table: Table, config: SourceConfig) -> list[str] | None:
    """Return the names that a table has for the numbers in its label column."""
    feature = dig(table.features, config.label) if config.label else None
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def row_captions(record: Mapping[str, Any], config: SourceConfig) -> dict[str, list[str]]:
    """Return the captions of a record by language, as a `Row` has them."""
    cells = {language: clean_captions(dig(record, column)) for language, column in config.captions.items()}
    return {language: captions for language, captions in cells.items() if captions}


def _image(value: Any, config: SourceConfig) -> bytes | Path | None:
    """Return an image cell's bytes or path; None if it holds neither."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        return None
    root = Path(config.image_root) if config.image_root else Path(config.path).parent
    return root / value


def _records(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Turn columns into records."""
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _under(name: str, column: str) -> bool:
    """Tell whether a table's column `name` holds the dotted `column`."""
    return column == name or column.startswith(f"{name}.")


def _annotation_columns(config: SourceConfig) -> SourceConfig:
    """KoCLIP's and COCO's annotation files have fixed columns; they hold one language, Korean unless named."""
    language = next(iter(config.captions)) if len(config.captions) == 1 else "ko"
    return dataclasses.replace(config, image="file_path", captions={language: "captions"}, languages=None)
