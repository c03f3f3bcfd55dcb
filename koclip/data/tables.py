"""Read tables of rows with `datasets`: local files, image folders, tar shards, the Hub. Images stay encoded."""

import csv
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetsError

from koclip.config import ConfigError, SourceConfig

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
    except SourceError:
        raise
    except UNREADABLE as error:
        cause = error.__cause__ or error  # `datasets` wraps what went wrong
        reason = f"{type(cause).__name__}: {cause}".split("\n")[0]
        raise SourceError(
            f"source {config.path!r} cannot be read as {kind}, split {config.split!r}: {reason}; "
            "check path, format and split"
        ) from error
    single = [column for column in (config.image, config.label) if column]
    named = [*single, *config.captions.values(), *(config.where or {})]
    missing = sorted({column for column in named if not _has(features, column)})
    if missing:
        raise SourceError(f"source {config.path!r} has no column {missing}; its columns are {sorted(_names(features))}")
    needed = {_top(features, column) for column in named}
    table = table.select_columns(sorted(needed | (features.keys() & _KEYS)))
    return _undecoded(table, config.image) if config.image else table


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


def _has(feature: Any, column: str) -> bool:
    """Tell whether a table with these features, or such a record, has a column; JSON may hold anything."""
    if isinstance(feature, _LISTS):
        return _has(feature.feature, column)
    if not isinstance(feature, Mapping):
        return isinstance(feature, datasets.Json)
    top = _top(feature, column)
    return top in feature and (top == column or _has(feature[top], column[len(top) + 1 :]))


def _names(feature: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the columns in `feature`."""
    if isinstance(feature, _LISTS):
        yield from _names(feature.feature, prefix)
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from _names(inner, f"{prefix}.{name}" if prefix else name)
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
    files = [config.path] if "://" in config.path else _files(config.path)
    if not files:
        raise SourceError(
            f"source {config.path!r} matches no file (from {Path.cwd()}); check the path, "
            "or set format: hub for a Hub data set"
        )
    if config.path.endswith(".tsv"):
        # Quotes are text in such files: taken for CSV's, one that is not closed swallows the lines after it.
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    if config.columns:
        options["column_names"] = config.columns
    builder = "json" if kind == "annotations" else kind
    return datasets.load_dataset(builder, data_files={config.split.split("[")[0]: files}, **options)


def _files(path: str) -> list[str]:
    """Return the files that a path or glob pattern names, sorted."""
    pattern = Path(path)
    return sorted(str(found) for found in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def stored_files(config: SourceConfig) -> list[Path]:
    """Return the files on this machine that a source is read from, sorted."""
    if Path(config.path).is_dir():
        return sorted(path for path in Path(config.path).rglob("*") if path.is_file())
    if file_format(config) in ("hub", "scenes") or "://" in config.path:
        return []
    return [Path(file) for file in _files(config.path)]
