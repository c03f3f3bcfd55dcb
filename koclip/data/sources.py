"""Open a data set of images with captions, in any format of `koclip.data.formats`. Images stay undecoded."""

import itertools
import math
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koclip import installation
from koclip.config import SourceConfig
from koclip.data.formats import MapSource, Row, RowCaptions, Skip, Source, Table, dig, formats
from koclip.data.formats.files import SourceError, file_format, find, is_remote, picture_path
from koclip.data.formats.tables import KEYS, UNREADABLE, open_table, reason
from koclip.data.transforms import ImageError, digest_of, image_id, read
from koclip.text.normalize import clean_captions

installation.require("data")
import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402

__all__ = [
    "MapSource",
    "Row",
    "Skip",
    "Source",
    "SourceError",
    "StreamSource",
    "TableSource",
    "open_source",
    "row_captions",
]

_PATH = ".path"  # suffix of the column with the path of a picture, in tables without pictures


class TableSource(MapSource):
    """A `datasets.Dataset` as a map source. `numbers` are the stored row numbers, if the source selects rows."""

    def __init__(self, table: datasets.Dataset, config: SourceConfig, numbers: Sequence[int] | None = None) -> None:
        self.config = config
        self._table, self._numbers = table, numbers
        self._classes = _class_names(table, config)
        self._captions = _without_pictures(table, config)

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

    def captions(self, indices: Sequence[int]) -> list[RowCaptions]:
        """Read these rows' caption columns."""
        return [row_captions(record, self.config) for record in _records(self._captions[list(indices)])]

    def picture_sizes(self) -> pa.ChunkedArray | None:
        """Return the size in bytes of each picture, without reading it; None if the table contains no pictures."""
        if len(self.config.images) != 1 or self.config.images[0] not in self._table.column_names:
            return None
        column = self._table.data.column(self.config.images[0])
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            return None
        sizes, indices = pc.binary_length(column), self._table._indices  # reads only the offsets
        if indices is not None:  # rows were selected
            sizes = sizes.take(indices.column(0))
        return None if sizes.null_count == len(sizes) else sizes


def _without_pictures(table: datasets.Dataset, config: SourceConfig) -> datasets.Dataset:
    """Return a table with the captions, the labels, the keys and the paths of pictures, but without the pictures."""
    paths = []
    for image in config.images:
        if isinstance(table.features.get(image), datasets.Image):
            table = table.flatten()
            paths.append(f"{image}{_PATH}")
        elif table.features.get(image) == datasets.Value("string"):
            paths.append(image)
    wanted = [*config.captions.values(), *([config.label] if config.label else [])]
    columns = [name for name in table.column_names if any(_under(name, own) for own in wanted)]
    return table.select_columns(list(dict.fromkeys([*columns, *paths, *(table.features.keys() & KEYS)])))


class StreamSource:
    """A `datasets.IterableDataset`: rows in order of arrival, with its shards split among readers.

    `shards` are the names of the shards; by default their numbers.
    """

    def __init__(self, stream: datasets.IterableDataset, config: SourceConfig, shards: Sequence[str] = ()) -> None:
        self.config = config
        self._stream = stream
        self._classes = _class_names(stream, config)
        self.left_out: Iterable[Skip] = ()
        self._shards = shards if len(shards) == self.num_shards else list(map(str, range(self.num_shards)))

    @property
    def size(self) -> None:
        """None: the number of rows is unknown before they are read."""

    @property
    def num_shards(self) -> int:
        """Number of shards, which different readers can read."""
        return int(self._stream.num_shards)

    def rows(self, epoch: int, seed: int, buffer_size: int, reader: int, num_readers: int) -> Iterator[Row]:
        """Yield the rows of one pass that belong to `reader`; the order is a function of (seed, epoch, reader).

        Raises:
            SourceError: a shard is broken.
        """
        # The same order for all readers, which then split it.
        shards = np.random.default_rng((seed, epoch)).permutation(self.num_shards)[reader::num_readers]
        rng = random.Random(f"shuffle {seed} {epoch} {reader}")
        held: list[Row] = []
        for row in itertools.chain.from_iterable(self._rows_of(self._stream, shard) for shard in shards.tolist()):
            if len(held) < buffer_size:
                held.append(row)
                continue
            place = rng.randrange(buffer_size)
            yield held[place]
            held[place] = row
        rng.shuffle(held)
        yield from held

    def iter_rows(self, images: bool = True) -> Iterator[Row]:
        """Yield every row in stored order. Without `images`, image files are not read if the format allows it.

        Raises:
            SourceError: a shard is broken.
        """
        stream = self._stream if images else self._without_images()
        return itertools.chain.from_iterable(self._rows_of(stream, shard) for shard in range(self.num_shards))

    def rows_of_shard(self, shard: int) -> Iterator[Row]:
        """Yield the rows of one shard in stored order.

        Raises:
            SourceError: the shard is broken.
        """
        return self._rows_of(self._stream, shard)

    def _without_images(self) -> datasets.IterableDataset:
        labels = [self.config.label] if self.config.label else []
        wanted = [*self.config.captions.values(), *labels, *_deciding(self.config), *KEYS]
        names = [name for name in self._stream.column_names or [] if any(_under(name, column) for column in wanted)]
        return self._stream.select_columns(names) if names else self._stream

    def _rows_of(self, stream: datasets.IterableDataset, shard: int) -> Iterator[Row]:
        name = self._shards[shard] if self.num_shards > 1 else ""
        for number, record in self._records_of(stream, shard):
            yield row(record, self.config, str(number), self._classes, name)

    def _records_of(self, stream: datasets.IterableDataset, shard: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows of a shard that the source selects, with their numbers in the shard."""
        number = -1
        try:
            # iter(), because a loop over the stream itself would split the shards again over the loader's workers.
            for columns in stream.shard(self.num_shards, shard).iter(batch_size=1):
                for record in _records(columns):
                    number += 1
                    if _selects(self.config, record):
                        yield number, record
        except UNREADABLE as error:
            place = f"after row {number} of" if number >= 0 else "at the start of"
            raise SourceError(
                f"source {self.config.path!r} cannot be read {place} shard {self._shards[shard]}: {reason(error)}; "
                "repair that file or remove it from the source"
            ) from error


def open_source(config: SourceConfig, seed: int = 0) -> MapSource | StreamSource:
    """Open a source; `seed` is the seed of `scenes`.

    Raises:
        SourceError: the format, the file, the data set or a column named in `config` does not exist, or no row matches.
    """
    kind = file_format(config)
    own = formats()[kind]
    if not own.encoded and config.encoding != "utf-8":
        raise SourceError(
            f"data.sources[].encoding: got {config.encoding!r} for {config.path!r}, but {kind} files define their "
            "encoding; remove this setting"
        )
    config = own.columns(config) if own.columns else config
    source = _source(open_table(config, kind, seed), config, kind)
    if own.left_out:
        source.left_out = own.left_out(config)
    return source


def _source(table: Table | MapSource, config: SourceConfig, kind: str) -> MapSource | StreamSource:
    """Return a table as a source, with the rows that `config` selects."""
    selected = {"where": config.where, "image_range": config.image_range}
    if isinstance(table, MapSource):
        if unused := [f"data.sources[].{name}" for name, value in selected.items() if value]:
            raise SourceError(f"{', '.join(unused)}: {kind} cannot select rows; remove it from {config.path!r}")
        return table
    if isinstance(table, datasets.IterableDataset):
        return StreamSource(table, config, _shard_names(config, kind))
    numbers = None
    if deciding := _deciding(config):
        names = [name for name in table.column_names if any(_under(name, column) for column in deciding)]
        columns = table.select_columns(names)
        numbers = [number for number, record in enumerate(columns) if _selects(config, record)]
        table = table.select(numbers)
    if len(table) == 0:
        settings = ", ".join(f"{name}: {value}" for name, value in selected.items())
        raise SourceError(f"source {config.path!r} has no rows ({settings}); check path, split and these settings")
    return TableSource(table, config, numbers)


def row(
    record: Mapping[str, Any],
    config: SourceConfig,
    number: str,
    classes: Sequence[str] | None = None,
    shard: str = "",
) -> Row:
    """Turn a record of a table, its cells by column, into a `Row`.

    The source's key, the name of the shard and the row's number in it identify the row; its key also has its name.
    `classes` are the class names of numeric labels.
    """
    cells = [dig(record, column) for column in config.images]
    value, image = next(((cell, image) for cell in cells if (image := _image(cell, config)) is not None), (None, None))
    path = value.get("path") if isinstance(value, Mapping) else value
    path = path or next((path for column in config.images if (path := record.get(f"{column}{_PATH}"))), None)
    name = record.get("__key__") or (Path(path).name if isinstance(path, str) else None) or record.get("id")
    key = "/".join(filter(None, (config.key, shard, number, str(name or ""))))
    key = key.encode("utf-8", "replace").decode()  # names may contain bytes that are not UTF-8
    label = _label(dig(record, config.label), classes) if config.label else None
    return Row(image, row_captions(record, config), key, label)


def _label(value: Any, classes: Sequence[str] | None) -> str | None:
    """Return a label as text, by its class name if the table has names; None for a missing label (NaN, -1)."""
    if isinstance(value, float):  # pandas turns integers into floats if some are missing
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if classes is not None and isinstance(value, int):
        value = classes[value] if 0 <= value < len(classes) else None
    return None if value is None else _nfc(value)


def _nfc(value: object) -> str:
    """Return a label as text in NFC: folders from macOS have decomposed names."""
    return unicodedata.normalize("NFC", str(value))


def _deciding(config: SourceConfig) -> list[str]:
    """Return the columns that decide which rows a source selects."""
    return [*(config.where or {}), *(config.images if config.image_range else [])]


def _selects(config: SourceConfig, record: Mapping[str, Any]) -> bool:
    """Return whether a record has the values of `where`, compared as text, and an image in `image_range`."""
    where = config.where or {}
    if not all(_nfc(dig(record, column)) in map(_nfc, values) for column, values in where.items()):
        return False
    if config.image_range is None:
        return True
    images = [_image(dig(record, column), config) for column in config.images]
    try:
        content = read(next((image for image in images if image is not None), None))
    except ImageError:
        return True  # whoever reads the row lists it as skipped
    low, high = config.image_range
    place = image_id(digest_of(content)) / 2**63  # 0 to 1
    return low <= place < high or place == high == 1


def _shard_names(config: SourceConfig, kind: str) -> list[str]:
    """Return a unique name without a slash for each local file of a source."""
    if is_remote(config.path):
        return []
    names = [Path(file).name for file in find(config.path, kind)]
    alike = len(set(names)) < len(names)
    return [f"{number}-{name}" if alike else name for number, name in enumerate(names)]


def _class_names(table: Table, config: SourceConfig) -> list[str] | None:
    """Return the class names of a table's label column, None if it has none."""
    feature = dig(table.features, config.label) if config.label else None
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def row_captions(record: Mapping[str, Any], config: SourceConfig) -> RowCaptions:
    """Return the clean captions of a record by language."""
    cells = {language: clean_captions(dig(record, column)) for language, column in config.captions.items()}
    return {language: captions for language, captions in cells.items() if captions}


def _image(value: Any, config: SourceConfig) -> bytes | Path | None:
    """Return the bytes or the path in an image cell; None if it has neither."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        return None
    return picture_path(config, value)


def _records(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _under(name: str, column: str) -> bool:
    """Return whether the column `name` of a table contains the dotted `column`."""
    return column == name or column.startswith(f"{name}.")
