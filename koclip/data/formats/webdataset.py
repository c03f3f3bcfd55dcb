"""Read WebDataset shards: tar archives of samples, local or remote, compressed or not.

The files of a sample follow one another and share their name up to its first dot; the rest, in lower case, is the name
of a column. For `tarfile`, any block that is not a header ends the archive. Here only the end-of-archive block does, so
that a cut or damaged shard is an error and does not silently lose samples.
"""

import bz2
import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import datasets
from datasets.data_files import DataFilesList
from datasets.download.streaming_download_manager import xopen

from koclip.config import SourceConfig
from koclip.data.formats import Format
from koclip.data.formats.files import FileError, decode, files_of, is_remote

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # names of the sample and of the column
_UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_BLOCK = 512  # bytes
_MAX_FILES = 1_000  # per sample

Fields = dict[str, Any]


class ShardError(FileError):
    """A shard that cannot be read. The message names it and says what to do."""


class Columns(NamedTuple):
    """The files of a sample that are read: its image files and its text files, and the encoding of the texts."""

    images: tuple[str, ...]
    texts: tuple[str, ...]  # dotted: `json.ko` is in the file `json`
    encoding: str = "utf-8"

    @classmethod
    def of(cls, config: SourceConfig) -> "Columns":
        """Return the columns that a source names."""
        label = [config.label] if config.label else []
        return cls(tuple(config.images), (*config.captions.values(), *label, *(config.where or {})), config.encoding)

    def has_text(self, name: str) -> bool:
        """Return whether this file of a sample is read as text."""
        return any(text == name or text.startswith(f"{name}.") for text in self.texts)

    def has(self, name: str) -> bool:
        """Return whether this file of a sample is read."""
        return name in self.images or self.has_text(name)


def stream(files: Sequence[str], config: SourceConfig) -> datasets.IterableDataset:
    """Return the samples of shards as a stream; addresses may be patterns.

    Raises:
        ShardError: a local shard has no end, or the split has brackets.
        OSError: an address does not exist.
    """
    if "[" in config.split:
        raise ShardError(
            f"source {config.path!r}: got split {config.split!r}, expected one without brackets: shards are read "
            "whole; name fewer shards"
        )
    files = [file for path in files for file in (DataFilesList.from_patterns([path]) if is_remote(path) else [path])]
    _check_ends(files)
    return datasets.IterableDataset.from_generator(_samples, gen_kwargs={"files": files, "columns": Columns.of(config)})


def _samples(files: Sequence[str], columns: Columns) -> Iterator[Fields]:
    """Yield the samples of shards in stored order: `__key__`, `__url__`, and a text, JSON value or bytes by column.

    Columns that are not read have the value None.
    """
    for file in files:
        keys: set[str] = set()
        for key, data in _grouped(file):
            where = f"shard {file}, sample {key!r}"
            if key in keys:
                raise ShardError(f"{where}: its files do not follow one another; pack the shard again in order")
            keys.add(key)
            _check_names(where, data, columns)
            yield {"__key__": key, "__url__": file, **_read(where, data, columns)}


def _check_ends(files: Sequence[str]) -> None:
    """Check, before anything is read, that local shards end with zeros, as archives do."""
    for file in files:
        if is_remote(file) or Path(file).suffix.lower() in _UNPACK:
            continue
        with Path(file).open("rb") as shard:
            shard.seek(max(0, shard.seek(0, 2) - _BLOCK))
            if shard.read() != bytes(_BLOCK):
                raise ShardError(f"shard {file} is cut: it has no end-of-archive block; copy or pack it again")


def _grouped(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield each sample's name and the content of its files by column."""
    name, data = "", dict[str, bytes]()
    for path, content in _members(file):
        match = _NAME.fullmatch(path)
        if match is None:
            continue  # a hidden name, or one without a dot, is not part of a sample
        key, column = match[1], match[2].lower()
        if key != name and data:
            yield name, data
            data = {}
        name = key
        if len(data) == _MAX_FILES:
            raise ShardError(
                f"shard {file}: sample {key!r} has over {_MAX_FILES} files; pack it again: a name ends at its first dot"
            )
        if column in data:
            raise ShardError(f"shard {file}: sample {key!r} has two files {column!r}; pack it again")
        data[column] = content
    if data:
        yield name, data


def _members(file: str) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of every file in an archive, up to its end-of-archive block."""
    path, ended = "", False

    class Header(tarfile.TarInfo):
        """A header block, or the zeros at the end; a shard may hold several archives."""

        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            nonlocal ended
            ended = not any(buf) and (ended or len(buf) == _BLOCK)
            try:
                return super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                if ended:
                    raise
                raise tarfile.ReadError(f"no end-of-archive block, but: {error}") from error

    try:
        with _unpacked(file) as data, tarfile.open(fileobj=data, mode="r|", tarinfo=Header, ignore_zeros=True) as shard:
            for member in shard:
                path = member.name
                if member.isreg():
                    yield path, cast(IO[bytes], shard.extractfile(member)).read()
                elif not member.isdir():
                    raise tarfile.ReadError(f"{path} is a link or a device; pack with tar --dereference")
                shard.members = []  # type: ignore[attr-defined]  # do not keep all headers in memory
    except _BROKEN as error:
        place = f"after {path!r}" if path else "at its beginning"
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ShardError(f"shard {file} is cut or damaged {place}: {reason}; copy or pack it again") from error


@contextmanager
def _unpacked(file: str) -> Iterator[IO[bytes]]:
    """Open a local or remote shard, and decompress it if its suffix says so."""
    remote = is_remote(file)
    unpack = _UNPACK.get(Path(file.split("?")[0] if remote else file).suffix.lower())
    with (
        xopen(file, "rb", block_size=0) if remote else Path(file).open("rb") as packed,
        unpack(packed) if unpack else nullcontext(packed) as data,
    ):
        yield data


def _read(where: str, data: dict[str, bytes], columns: Columns) -> Fields:
    """Return the columns of a sample from its files."""
    fields: Fields = dict.fromkeys(data)
    for column, content in data.items():
        if column in columns.images:
            fields[column] = content
        elif columns.has_text(column):
            text = decode(content, columns.encoding, f"{where}, {column}").strip()
            try:
                fields[column] = json.loads(text) if column.split(".")[-1] in ("json", "jsn") else text
            except ValueError as error:
                raise ShardError(f"{where}, {column}: {type(error).__name__}: {error}".split("\n")[0]) from error
    return fields


def _check_names(where: str, names: Iterable[str], columns: Columns) -> None:
    """Refuse a sample that seems to hold several, whose names have dots: a.b.jpg and a.b.txt belong to the sample a.

    It does if several of its files (one, if images are not read) end in column names and begin alike. One alone may be
    another picture of the same sample, such as a.small.jpg.
    """
    beginnings: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[place:]) for place in range(1, len(parts))]
        beginnings.update(name.removesuffix(end) for end in endings if columns.has(end) and not columns.has(name))
    if beginnings and max(beginnings.values()) >= (2 if columns.images else 1):
        raise ShardError(
            f"{where} has the files {sorted(names)[:10]}: its name ends at the first dot, the rest is a column; pack "
            "the shard again with sample names that have no dots"
        )


FORMATS = {
    "webdataset": Format(
        lambda config, seed: stream(files_of(config, "webdataset"), config), (".tar", ".tgz"), encoded=True
    )
}
