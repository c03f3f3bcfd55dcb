"""Read what img2dataset wrote: tar shards, Parquet files, or folders of pictures.

Next to the pictures, img2dataset writes a Parquet file for each shard, with a row for each URL: `key`, `url`,
`caption`, `status`, `error_message` and the other columns of the list of URLs. Rows with the status `success` are read;
others are left out, and listed. Source of the layouts: writer.py and downloader.py of img2dataset 1.47.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from koclip.config import SourceConfig, locate
from koclip.data.formats import Format, Skip, Table
from koclip.data.formats.files import SourceError, find, is_folder, printable, stamp, suffix_of
from koclip.data.formats.tables import file_table
from koclip.data.formats.text_files import Task, open_records
from koclip.data.formats.webdataset import stream

IMAGES = ["jpg", "png", "webp"]  # columns and suffixes of pictures: `encode_format`
_STATUS, _SUCCESS = "status", "success"
_LISTED = ("key", _STATUS, "error_message")


class Output(NamedTuple):
    """The files of a source: tar shards if there are any, and the Parquet files with a row for each URL."""

    shards: list[str]
    tables: list[str]

    @classmethod
    def of(cls, config: SourceConfig) -> "Output":
        """Return the files of a folder, or of a pattern of tar shards or Parquet files.

        Raises:
            SourceError: there are none, or they are not from img2dataset.
        """
        kinds = ("webdataset", "parquet") if is_folder(locate(config.path)) else (None,)
        files = [file for kind in kinds for file in find(config.path, kind)]
        shards = [file for file in files if suffix_of(file) == ".tar"]
        tables = [file for file in files if suffix_of(file) == ".parquet"]
        if shards and not tables:
            tables = [str(table) for shard in shards if (table := Path(shard).with_suffix(".parquet")).is_file()]
        wrong = [table for table in tables if not {*_LISTED} <= {*pq.read_schema(table).names}]
        if wrong or not (shards or tables):
            raise SourceError(
                f"source {config.path!r}: got {wrong[:1] or 'no .tar or .parquet files'}, expected the output folder "
                f"of img2dataset: tar shards, and Parquet files with the columns {', '.join(_LISTED)}"
            )
        return cls(shards, tables)

    @property
    def holds_pictures(self) -> bool:
        """Whether the pictures are in the Parquet files."""
        return not self.shards and any(name in IMAGES for name in pq.read_schema(self.tables[0]).names)


def _columns(config: SourceConfig) -> SourceConfig:
    """Name the columns of the images. In tar shards, the columns of the list of URLs are in the file `json`."""
    output = Output.of(config)
    prefix = "json." if output.shards else ""
    where = {prefix + column: values for column, values in (config.where or {}).items()}
    return dataclasses.replace(
        config,
        image=None if config.image is None else IMAGES,
        captions={language: prefix + column for language, column in config.captions.items()},
        label=config.label and prefix + config.label,
        where=where | ({_STATUS: [_SUCCESS]} if output.holds_pictures else {}) or None,
    )


def _open(config: SourceConfig, seed: int) -> Table:
    output = Output.of(config)
    if output.shards:
        return stream(output.shards, config)
    if output.holds_pictures:
        return file_table("parquet", config, seed)
    return open_records(config, _records, output.tables, [str(stamp(file)) for file in output.tables])


def _records(file: str, task: Task) -> Iterator[Mapping[str, Any]]:
    """Yield the downloaded rows of a Parquet file; their pictures are in a folder with its name."""
    folder = Path(file).with_suffix("")
    suffixes = {path.stem: path.suffix[1:] for path in folder.iterdir() if path.suffix[1:] in IMAGES}
    for batch in pq.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            if row[_STATUS] == _SUCCESS:
                suffix = suffixes.get(row["key"], IMAGES[0])
                yield {**row, suffix: str(folder / f"{row['key']}.{suffix}")}


class Failures:
    """The URLs without a picture, as an iterable of `Skip`, with status and error as the reason. They stay on disk."""

    def __init__(self, config: SourceConfig) -> None:
        self._config, self._tables = config, Output.of(config).tables

    def __iter__(self) -> Iterator[Skip]:
        folder = os.path.commonpath([str(Path(table).parent) for table in self._tables]) if self._tables else ""
        for table in self._tables:
            place = f"{self._config.key}/{Path(table).relative_to(folder)}"
            for key, status, error in _rows(table):
                if status != _SUCCESS:
                    reason = f"{status}: {error}" if error else f"{status}"
                    yield Skip(printable(f"{place}/{key}"), reason, printable(self._config.path))


def _rows(table: str) -> Iterator[Sequence[Any]]:
    """Yield key, status and error of each row of a Parquet file."""
    for batch in pq.ParquetFile(table).iter_batches(columns=list(_LISTED)):
        yield from zip(*(batch.column(name).to_pylist() for name in _LISTED), strict=True)


FORMATS = {"img2dataset": Format(_open, columns=_columns, left_out=Failures)}
