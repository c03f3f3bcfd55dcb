"""Read tables with `datasets`: Parquet, Arrow, the Hub, `save_to_disk`. Images stay encoded."""

import glob
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from xxhash import xxh3_64_hexdigest

from koclip.config import SourceConfig, locate
from koclip.data.formats import (
    LISTS,
    Format,
    MapSource,
    Table,
    column_names,
    formats,
    has_column,
    top_column,
    webdataset,
)
from koclip.data.formats.files import FileError, SourceError, files_of, is_folder, is_remote, stamp, walk
from koclip.data.formats.text_files import select_split

# Errors of `datasets` and its readers if files are missing or broken.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, EOFError),
    *(DatasetsError, tarfile.TarError, zlib.error, lzma.LZMAError),
)
KEYS = ("__key__", "__url__", "id")  # columns that name a row
_PEEKED = 5  # rows of a stream that are read to find its columns
_PARTS = 64  # most shards of a stream from `save_to_disk`


def open_table(config: SourceConfig, kind: str, seed: int) -> Table | MapSource:
    """Open a source's table with the columns that `config` names and the columns that name a row.

    If the format opens a `MapSource`, it is returned unchanged.

    Raises:
        SourceError: the files, the data set, its split or a column do not exist, or cannot be read.
    """
    try:
        table = formats()[kind].open(config, seed)
        if isinstance(table, MapSource):
            return table
        # The columns of some streams are known only from their rows.
        heads: list[Any] = [table.features] if table.features else list(table.take(_PEEKED))
    except UNREADABLE as error:
        raise _unreadable(config, kind, error) from error
    single = [*([config.label] if config.label else []), *config.captions.values(), *(config.where or {})]
    images = [column for column in config.images if any(has_column(head, column) for head in heads)]
    missing = {column for column in single if not any(has_column(head, column) for head in heads)}
    missing |= set() if images else set(config.images)
    if missing:
        names = sorted({name for head in heads for name in column_names(head)})
        raise SourceError(f"source {config.path!r} has no column {sorted(missing)}; its columns are {names}")
    if not table.features:
        return table  # its rows may have different columns
    needed = {top_column(table.features, column) for column in [*images, *single]}
    table = table.select_columns(sorted(needed | (table.features.keys() & KEYS)))
    return _undecoded(table, images)


def reason(error: BaseException) -> str:
    """Return the message of a reader's error, on one line if the error is not koclip's."""
    return str(error) if isinstance(error, FileError) else f"{type(error).__name__}: {error}".split("\n")[0]


def _unreadable(config: SourceConfig, kind: str, error: BaseException) -> SourceError:
    """Return the error for a source that cannot be opened."""
    while error.__cause__ and not isinstance(error, (SourceError, FileError)):
        error = error.__cause__  # `datasets` wraps the first error
    if isinstance(error, SourceError):
        return error
    advice = "" if isinstance(error, FileError) else "; check path, format and split"
    return SourceError(
        f"source {config.path!r} cannot be read as {kind}, split {config.split!r}: {reason(error)}{advice}"
    )


def _undecoded(table: Table, images: Sequence[str]) -> Table:
    """Turn off the decoding of images, so that a broken image does not stop the reader."""
    if isinstance(table, datasets.IterableDataset):
        # decode(False) stops the threads that decode remote images, and also the reading of JSON cells.
        return table.decode(False).cast(datasets.Features(_images_encoded(table.features))) if images else table
    if set(images) - table.features.keys():
        table = table.flatten()  # moves a nested image to the top, under its dotted name
    for image in images:
        if isinstance(table.features.get(image), datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
    return table


def _images_encoded(feature: Any) -> Any:
    """Return a feature with all its images undecoded."""
    if isinstance(feature, LISTS):
        return type(feature)(_images_encoded(feature.feature))
    if isinstance(feature, Mapping):
        return {name: _images_encoded(inner) for name, inner in feature.items()}
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def file_table(kind: str, config: SourceConfig, seed: int) -> Table:
    """Open Parquet or Arrow files; `kind` is the name of the format."""
    options: dict[str, Any] = {"split": config.split, "streaming": config.streaming}
    files = files_of(config, kind)
    if not is_remote(config.path):
        options["features"] = _features(files, kind)
    return datasets.load_dataset(kind, data_files={config.split.split("[")[0]: files}, **options)


def _hub_table(config: SourceConfig, seed: int) -> Table:
    """Load a data set of the Hub, or a folder with the same layout."""
    options: dict[str, Any] = {"revision": config.revision}
    path = config.path
    if is_folder(locate(path)):
        path = str(locate(path).resolve())
        if glob.has_magic(path) or "::" in path:
            raise SourceError(
                f"source {path!r}: datasets reads [ ] * ? and :: in a folder's name as patterns; rename the folder"
            )
        # With names and `mtime` alone, the cache of `datasets` would not notice that a file was replaced.
        files = xxh3_64_hexdigest(repr([(str(file), stamp(file)) for file in walk(Path(path))]).encode())
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{files}")
    options |= {"split": config.split, "streaming": config.streaming}
    table = datasets.load_dataset(path, config.subset, **options)
    if table.info.builder_name == "webdataset":
        where = {name: options[name] for name in options.keys() & {"revision", "cache_dir"}}
        builder = datasets.load_dataset_builder(path, config.subset, **where)
        return webdataset.stream(list(builder.config.data_files[config.split]), config)
    if table.info.builder_name == "csv":  # keep cells as text; pandas would convert them
        names: Iterable[str] = table.column_names or next(iter(table), {})
        texts = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
        return datasets.load_dataset(path, config.subset, features=texts, keep_default_na=False, **options)
    return table


def _saved_table(config: SourceConfig, seed: int) -> Table:
    folder = str(locate(config.path).absolute())
    saved, split = datasets.load_from_disk(folder), config.split.split("[")[0]
    if isinstance(saved, datasets.DatasetDict) and split not in saved:
        raise SourceError(f"source {config.path!r} has no split {split!r}; it has {sorted(saved)}")
    table = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    table = select_split(table.with_format(None), config.split)  # a format is saved too
    return table.to_iterable_dataset(min(_PARTS, max(1, len(table)))) if config.streaming else table


def _features(files: Sequence[str], kind: str) -> datasets.Features | None:
    """Return the features of files whose first file has a column without values; None if its features are complete.

    `datasets` would use the type of that column in the first file, `null`, for all files.
    """
    features = first = None
    for file in files:
        with Path(file).open("rb") as opened:
            if kind == "parquet":
                schema = pq.read_schema(opened)
            else:
                try:
                    schema = pa.ipc.open_stream(opened).schema
                except pa.ArrowInvalid:
                    schema = pa.ipc.open_file(opened).schema
        following = datasets.Features.from_arrow_schema(schema)
        first = first or following
        features = datasets.Features(_filled(features, following)) if features else following
    return None if features == first else features


def _filled(feature: Any, other: Any) -> Any:
    """Return a feature with each `null` type replaced by the type in `other`."""
    if isinstance(feature, datasets.Value) and feature.dtype == "null":
        return other
    if isinstance(feature, LISTS) and isinstance(other, LISTS):
        return type(feature)(_filled(feature.feature, other.feature))
    if isinstance(feature, Mapping) and isinstance(other, Mapping):
        return {name: _filled(inner, other[name]) if name in other else inner for name, inner in feature.items()}
    return feature


FORMATS = {
    "hub": Format(_hub_table),
    "parquet": Format(partial(file_table, "parquet"), (".parquet",)),
    "arrow": Format(partial(file_table, "arrow"), (".arrow",)),
    "save_to_disk": Format(_saved_table),
}
