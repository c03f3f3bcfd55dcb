"""Open any set of (image, captions) rows: built in, Hub, Arrow and Parquet, JSON, CSV, folders, tar shards.

Everything but `scenes` is read by `datasets`, undecoded. A row's image stays bytes or a path until it is drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import numpy.typing as npt

from koclip.config import ConfigError, SourceConfig
from koclip.data import scenes
from koclip.text.normalize import clean_captions

_SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
}


class SourceError(ConfigError):
    """A source that cannot be opened. The message says what was asked, what there is, and what to do."""


class Row(NamedTuple):
    """One undecoded sample: captions by language (cleaned; may be empty) and a key that finds it again."""

    image: bytes | Path | npt.NDArray[np.uint8] | None
    captions: dict[str, list[str]]
    key: str


class MapSource(Protocol):
    """Rows by index. Rows `k * group ... k * group + group - 1` belong in one batch."""

    config: SourceConfig
    group: int

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Return these rows, in this order."""

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        """Return these rows' captions without touching the images."""


class ScenesSource:
    """The built-in scenes as a map source. `seed` makes another set of scenes."""

    group = 2

    def __init__(self, config: SourceConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return self.config.scenes_size

    def rows(self, indices: Sequence[int]) -> list[Row]:
        part = self.config.scenes_part
        drawn = [scenes.scene(part, self.seed, index) for index in indices]
        return [
            Row(scenes.draw(scene, index), self._choose(scene), f"scenes/{part}/{index}")
            for scene, index in zip(drawn, indices, strict=True)
        ]

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        return [self._choose(scenes.scene(self.config.scenes_part, self.seed, index)) for index in indices]

    def _choose(self, scene: scenes.Scene) -> dict[str, list[str]]:
        told = scenes.captions(scene)
        return {language: told[language] for language in self.config.captions}


class TableSource:
    """A `datasets.Dataset` as a map source."""

    group = 1

    def __init__(self, table: datasets.Dataset, config: SourceConfig) -> None:
        self.config = config
        self._table = table
        columns = {column.split(".")[0] for column in config.captions.values()}
        self._captions = table.select_columns(sorted(columns))

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        columns: dict[str, list[Any]] = self._table[list(indices)]
        records = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [row(record, self.config, index) for record, index in zip(records, indices, strict=True)]

    def captions(self, indices: Sequence[int]) -> list[dict[str, list[str]]]:
        columns: dict[str, list[Any]] = self._captions[list(indices)]
        records = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [row_captions(record, self.config) for record in records]


class StreamSource:
    """A `datasets.IterableDataset`: rows in order of arrival, split among readers."""

    def __init__(self, stream: datasets.IterableDataset, config: SourceConfig) -> None:
        self.config = config
        self._stream = stream

    def rows(self, epoch: int, seed: int, buffer_size: int, reader: int, num_readers: int) -> Iterator[Row]:
        """Yield the rows of one pass that belong to `reader`; the order is a function of (seed, epoch)."""
        stream = self._stream.shuffle(seed=seed, buffer_size=buffer_size)
        stream.set_epoch(epoch)
        if num_readers > 1:
            stream = datasets.distributed.split_dataset_by_node(stream, rank=reader, world_size=num_readers)
        for index, record in enumerate(stream):
            yield row(record, self.config, index)

    def stored_rows(self) -> Iterator[Row]:
        """Yield every row in stored order."""
        for index, record in enumerate(self._stream):
            yield row(record, self.config, index)

    def captions(self) -> Iterator[dict[str, list[str]]]:
        """Yield every row's captions in stored order."""
        columns = sorted({column.split(".")[0] for column in self.config.captions.values()})
        for record in self._stream.select_columns(columns):
            yield row_captions(record, self.config)


def open_source(config: SourceConfig, seed: int = 0) -> MapSource | StreamSource:
    """Open one source for reading.

    Raises:
        SourceError: the file, data set or a column named in `config` does not exist.
    """
    file_format = _format(config)
    if file_format == "scenes":
        return ScenesSource(config, seed)
    if file_format == "annotations":
        config = _annotation_columns(config)
    table = _load(config, file_format)
    _check_columns(table, config)
    if _column_feature(table, config.image) == "image":
        table = table.cast_column(config.image, datasets.Image(decode=False))
    if config.where:
        wanted = {column: set(values) for column, values in config.where.items()}
        table = table.filter(_Matches(wanted), input_columns=list(wanted))
    if isinstance(table, datasets.IterableDataset):
        return StreamSource(table, config)
    if len(table) == 0:
        raise SourceError(f"source {config.path!r} has no rows (where: {config.where}); check path, split and where")
    return TableSource(table, config)


class _Matches:
    """A picklable row filter, so that `datasets` can run and fingerprint it."""

    def __init__(self, wanted: Mapping[str, set[str]]) -> None:
        self.wanted = list(wanted.values())

    def __call__(self, *values: object) -> bool:
        return all(str(value) in wanted for value, wanted in zip(values, self.wanted, strict=True))


def row(record: Mapping[str, Any], config: SourceConfig, index: int) -> Row:
    """Turn one record of a table into a `Row`; its key is the stored key, the image's path, or the position."""
    value = _dig(record, config.image)
    path = value.get("path") if isinstance(value, dict) else value
    name = record.get("__key__") or (Path(path).name if isinstance(path, str) else None) or record.get("id") or ""
    return Row(_image(value, config), row_captions(record, config), f"{config.label}/{index}/{name}".rstrip("/"))


def row_captions(record: Mapping[str, Any], config: SourceConfig) -> dict[str, list[str]]:
    """Return the cleaned captions of a record by language; languages without any are left out."""
    cells = {language: clean_captions(_dig(record, column)) for language, column in config.captions.items()}
    return {language: captions for language, captions in cells.items() if captions}


def _image(value: Any, config: SourceConfig) -> bytes | Path | None:
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        return None
    root = Path(config.image_root) if config.image_root else Path(config.path).parent
    return root / value


def _dig(record: Mapping[str, Any], column: str) -> Any:
    """Return a column; dots reach into nested records."""
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _format(config: SourceConfig) -> str:
    if config.format != "auto":
        return config.format
    if config.path == "scenes":
        return "scenes"
    if Path(config.path).is_dir():
        return "image_folder"
    return _SUFFIXES.get(Path(config.path).suffix, "hub")


def _annotation_columns(config: SourceConfig) -> SourceConfig:
    """KoCLIP's and COCO's annotation files have fixed columns; they hold one language, Korean unless named."""
    from dataclasses import replace

    language = next(iter(config.captions)) if len(config.captions) == 1 else "ko"
    return replace(config, image="file_path", captions={language: "captions"}, languages=None)


def _load(config: SourceConfig, file_format: str) -> datasets.Dataset | datasets.IterableDataset:
    builder = {"image_folder": "imagefolder", "annotations": "json"}.get(file_format, file_format)
    streaming = config.streaming or file_format == "webdataset"
    if file_format == "hub":
        return datasets.load_dataset(config.path, split=config.split, revision=config.revision, streaming=streaming)
    path = Path(config.path)
    if file_format == "image_folder":
        if not path.is_dir():
            raise SourceError(f"source {config.path!r} is not a folder; expected a folder of images with metadata")
        return datasets.load_dataset(builder, data_dir=config.path, split=config.split, streaming=streaming)
    files = sorted(str(match) for match in path.parent.glob(path.name))
    if not files:
        raise SourceError(
            f"source {config.path!r} matches no file (from {Path.cwd()}); check the path, "
            "or set format: hub for a Hub data set"
        )
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)


def _check_columns(table: datasets.Dataset | datasets.IterableDataset, config: SourceConfig) -> None:
    columns = table.column_names
    if columns is None:  # a stream whose columns only its first row tells
        columns = list(next(iter(table)))
    named = [config.image, *config.captions.values(), *(config.where or {})]
    missing = sorted({column for column in named if column.split(".")[0] not in columns})
    if missing:
        raise SourceError(f"source {config.path!r} has no column {missing}; its columns are {sorted(columns)}")


def _column_feature(table: datasets.Dataset | datasets.IterableDataset, column: str) -> str:
    feature = (table.features or {}).get(column)
    return "image" if isinstance(feature, datasets.Image) else "other"
