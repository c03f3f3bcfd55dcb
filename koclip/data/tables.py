"""Read tables of rows with `datasets`: local files, image folders, tar shards, the Hub. Images stay encoded."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetsError

from koclip.config import ConfigError, SourceConfig
from koclip.data.encodings import FileError

TEXT = ("csv", "json", "annotations")  # `koclip.data.text_files` reads them
_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
}
# What `datasets` and the readers below it raise on files that are missing or broken.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, DatasetsError, tarfile.TarError)
_LISTS = (datasets.List, datasets.LargeList)
_KEYS = ("__key__", "__url__", "id")  # columns that name a row

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset


class SourceError(ConfigError):
    """A source that cannot be read. The message says what was asked, what there is, and what to do."""


def file_format(config: SourceConfig) -> str:
    """Return the format of a source: the one it names, or for `auto` what its path looks like."""
    if config.format != "auto":
        return config.format
    if config.path == "scenes":
        return "scenes"
    if Path(config.path).is_dir():
        return "image_folder"
    return _BUILDERS.get(Path(config.path).suffix, "hub")


def open_table(config: SourceConfig) -> Table:
    """Open a source's table, reduced to the columns that `config` names and those that name a row.

    Raises:
        SourceError: the files, the data set, its split or a column do not exist, or cannot be read.
    """
    kind = file_format(config)
    try:
        table = _load(config, kind)
        # A stream may tell its columns by its rows only.
        features: Mapping[str, Any] = table.features or next(iter(table.take(1)), {})
    except UNREADABLE as error:
        raise unreadable(config, kind, error) from error
    named = named_columns(config)
    missing = {column for column in named if not has_column(features, column)}
    if missing:
        raise missing_columns(config.path, missing, column_names(features))
    needed = {_top(features, column) for column in named}
    table = table.select_columns(sorted(needed | (features.keys() & _KEYS)))
    return _undecoded(table, config.image) if config.image else table


def named_columns(config: SourceConfig) -> list[str]:
    """Return the columns that a source names, each once."""
    single = [column for column in (config.image, config.label) if column]
    return list(dict.fromkeys([*single, *config.captions.values(), *(config.where or {})]))


def missing_columns(path: str, missing: Iterable[str], names: Iterable[str]) -> SourceError:
    """Return the error for columns that a source lacks; `names` are those that it has."""
    return SourceError(f"source {path!r} has no column {sorted(missing)}; its columns are {sorted(names)}")


def unreadable(config: SourceConfig, kind: str, error: BaseException) -> SourceError:
    """Return the error for a source that cannot be opened."""
    while error.__cause__ and not isinstance(error, (SourceError, FileError)):
        error = error.__cause__  # `datasets` wraps what went wrong
    if isinstance(error, SourceError):
        return error
    if isinstance(error, FileError):
        return SourceError(f"source {config.path!r} cannot be read as {kind}: {error}")
    return SourceError(
        f"source {config.path!r} cannot be read as {kind}, split {config.split!r}: {reason(error)}; "
        "check path, format and split"
    )


def reason(error: BaseException) -> str:
    """Return what an error of a reader says, on one line unless it is koclip's own."""
    return str(error) if isinstance(error, FileError) else f"{type(error).__name__}: {error}".split("\n")[0]


def dig(record: Any, column: str) -> Any:
    """Return a column of a record, None if it has none; dots reach into nested records and lists of records."""
    if isinstance(record, (list, tuple)):
        return [dig(one, column) for one in record]
    if not isinstance(record, Mapping):
        return None
    top = _top(record, column)
    return record.get(column) if top == column else dig(record.get(top), column[len(top) + 1 :])


def _top(record: Mapping[str, Any], column: str) -> str:
    """Return the part of a dotted column name that is a key of `record`: columns may have dots in their names."""
    parts = column.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in record), column)


def has_column(feature: Any, column: str) -> bool:
    """Tell whether a table with these features, or such a record, has a column; JSON may hold anything."""
    if isinstance(feature, _LISTS):
        return has_column(feature.feature, column)
    if isinstance(feature, list):
        return any(has_column(item, column) for item in feature)
    if not isinstance(feature, Mapping):
        return isinstance(feature, datasets.Json)
    top = _top(feature, column)
    return top in feature and (top == column or has_column(feature[top], column[len(top) + 1 :]))


def column_names(feature: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the columns in these features, or in such a record."""
    if isinstance(feature, _LISTS):
        yield from column_names(feature.feature, prefix)
    elif isinstance(feature, list) and feature and isinstance(feature[0], Mapping):
        yield from column_names(feature[0], prefix)
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from column_names(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


def _undecoded(table: Table, image: str) -> Table:
    """Make a table hand out its images as they are stored, so that a broken one does not stop the reader."""
    if isinstance(table, datasets.IterableDataset):
        if not table.features:
            return table
        # decode(False) stops the threads that decode remote images, but the reading of JSON cells too.
        return table.decode(False).cast(datasets.Features(_images_encoded(table.features)))
    if image not in table.features:
        table = table.flatten()  # brings a nested image to the top, under its dotted name
    if isinstance(table.features.get(image), datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return table


def _images_encoded(feature: Any) -> Any:
    """Return a feature with every image in it left as it is stored."""
    if isinstance(feature, _LISTS):
        return type(feature)(_images_encoded(feature.feature))
    if isinstance(feature, Mapping):
        return {name: _images_encoded(inner) for name, inner in feature.items()}
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def _load(config: SourceConfig, kind: str) -> Table:
    options: dict[str, Any] = {"split": config.split, "streaming": config.streaming or kind == "webdataset"}
    if kind == "hub":
        return datasets.load_dataset(config.path, config.subset, revision=config.revision, **options)
    if kind == "image_folder":
        if not Path(config.path).is_dir():
            raise SourceError(f"source {config.path!r} is not a folder; expected a folder of images with metadata")
        return datasets.load_dataset("imagefolder", data_dir=str(Path(config.path).resolve()), **options)
    return datasets.load_dataset(kind, data_files={config.split.split("[")[0]: files_of(config)}, **options)


def files_of(config: SourceConfig) -> list[str]:
    """Return the files that a source's path or glob pattern names, sorted; the pattern itself if it is a URL.

    Raises:
        SourceError: there is none.
    """
    if "://" in config.path:
        return [config.path]
    pattern = Path(config.path)
    files = sorted(str(found) for found in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not files:
        raise SourceError(
            f"source {config.path!r} matches no file (from {Path.cwd()}); check the path, "
            "or set format: hub for a Hub data set"
        )
    return files
