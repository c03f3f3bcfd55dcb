"""Find the files of a source, by name or pattern, and their format.

A file that exists is taken by its name, whatever characters are in it; patterns are read here, once: `datasets` would
read them again in the names that they match. It gets a list of files, with their sizes and times of change.
"""

import fnmatch
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from datasets.data_files import DataFilesList

from koclip.config import ConfigError, SourceConfig, locate
from koclip.data.formats import formats, formats_by_suffix

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an image folder's pictures, as in `datasets`
# Pictures by their names. Not all of these are read, but none is left out unlisted.
PICTURES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".tga", ".ico", ".psd", ".svg"),
    }
)
_COMPRESSED = (".gz", ".bz2", ".xz")  # what Python's own modules unpack
_MAGIC = frozenset("*?[")


class SourceError(ConfigError):
    """A source that cannot be read. The message says what was asked, what there is, and what to do."""


def is_remote(path: str) -> bool:
    """Tell an address such as hf://... or https://... from a local path."""
    return "://" in path and not _mode(locate(path))


def is_folder(path: str | Path) -> bool:
    """Tell whether a path is that of a folder."""
    return stat.S_ISDIR(_mode(Path(path)))


def suffix_of(path: str) -> str:
    """Return the end of a file's name that is for its format, in lower case: .csv of A.CSV and of a.csv.gz."""
    name = Path(urlsplit(path).path if path.startswith(("http://", "https://")) else path).name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def file_format(config: SourceConfig) -> str:
    """Return the name of a source's format: what it says, or for `auto` what its files look like.

    Raises:
        SourceError: there is no format of that name, or `auto` does not recognize it.
    """
    if config.format != "auto":
        if config.format not in formats():
            raise SourceError(
                f"data.sources[].format: got {config.format!r} for {config.path!r}, expected auto or one of "
                f"{sorted(formats())}"
            )
        return config.format
    if config.path == "scenes":
        return "scenes"
    if is_folder(locate(config.path)):
        return _folder_format(config.path)
    files = [] if is_remote(config.path) else find(config.path)
    known = formats_by_suffix()
    if not files:
        return known.get(suffix_of(config.path), "hub")
    suffixes = sorted({suffix_of(file) for file in files})
    names = {known.get(suffix) for suffix in suffixes}
    if None in names or len(names) > 1:
        raise SourceError(
            f"source {config.path!r}: the format of {len(files)} files, {files[0]} the first, is not clear: their "
            f"suffixes are {suffixes}, expected one kind of {sorted(known)}; name the files, or set format"
        )
    return str(names.pop())


def _folder_format(path: str) -> str:
    """Return the format of a folder; refuse one whose files are neither pictures nor saved by `datasets`."""
    folder = locate(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "save_to_disk"
    tables: dict[str, str] = {}
    for file in walk(folder):
        suffix = suffix_of(file.name)
        if file.name in METADATA or suffix in PICTURES:
            return "image_folder"
        if suffix in formats_by_suffix():
            tables.setdefault(file.name[file.name.lower().rindex(suffix) :], formats_by_suffix()[suffix])
    if not tables:
        raise SourceError(f"source {path!r} is a folder without a picture; expected an image folder, or name a file")
    ending = min(tables)
    raise SourceError(
        f"source {path!r} is a folder of {', '.join(sorted(tables))} files; name them, such as {path}/*{ending}, or "
        f"set format: {tables[ending]} to read all such as one split, or format: hub to let datasets find the splits"
    )


def find(path: str, kind: str | None = None) -> list[str]:
    """Return the files that a path names, absolute and sorted: itself, or what it matches as a pattern.

    Args:
        path: A file; or a pattern with `*`, `?`, `[...]` and `**`, which match no hidden names.
        kind: Format of the files to take where `path` is a folder; default: none of them.
    """
    place = locate(path)
    if is_folder(place):
        files = [file for file in walk(place) if kind and formats_by_suffix().get(suffix_of(file.name)) == kind]
    else:
        anchor = Path(path).anchor
        files = list(_matches(Path(anchor), Path(path).parts[bool(anchor) :]))
    return sorted({str(file.absolute()) for file in files}, key=_in_order)


def stored_files(config: SourceConfig) -> list[Path]:
    """Return the files on this machine that a source is read from, sorted; none for scenes and what is remote."""
    place = locate(config.path)
    if is_folder(place):
        return list(walk(place))
    return [] if config.path == "scenes" or is_remote(config.path) else list(map(Path, find(config.path)))


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names, without hidden ones; links are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_in_order)
        yield from (Path(place, name) for name in sorted(names, key=_in_order) if not name.startswith("."))


def listed(files: Sequence[str]) -> DataFilesList:
    """Return files as `datasets` takes them: as they are, and with what identifies their content.

    It would know a file by its path and `mtime` only, and give the rows of one that has been replaced since.

    Raises:
        SourceError: `datasets` cannot open a file of that name.
    """
    chained = [file for file in files if "::" in file]
    if chained:
        raise SourceError(f"source {chained[0]!r}: datasets takes '::' in a path for a chain of archives; rename it")
    return DataFilesList(list(files), [(str(stamp(file)),) for file in files])


def files_of(config: SourceConfig, kind: str) -> DataFilesList | list[str]:
    """Return a source's files; an address as it is.

    Raises:
        SourceError: there is none.
    """
    if is_remote(config.path):
        return [config.path]
    files = find(config.path, kind)
    if not files:
        raise SourceError(
            f"source {config.path!r} matches no file (from {Path.cwd()}); check the path, "
            "or set format: hub for a Hub data set"
        )
    return listed(files)


def stamp(path: str | Path) -> tuple[int, int, int]:
    """Return what differs when a file's content does: its size, and its mtime and ctime in ns.

    Programs that copy a time stamp (`cp -p`, rsync, tar) set mtime, and the system sets ctime. A file of the same size
    that is written within a tick of the file system's clock (milliseconds) is not noticed.

    Raises:
        OSError: there is no such file.
    """
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def printable(name: str) -> str:
    """Return a file name without the bytes in it that are not UTF-8: old Korean names are EUC-KR."""
    return os.fsencode(name).decode("utf-8", "replace")


def _matches(place: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files at or below a place that match a pattern, part by part; what exists under a part's name is it."""
    if not parts:
        yield from [place] if stat.S_ISREG(_mode(place)) else []
        return
    part, rest = unicodedata.normalize("NFC", parts[0]), parts[1:]
    literal = locate(place / parts[0])
    if _mode(literal):
        yield from _matches(literal, rest)
    elif is_folder(place) and _MAGIC & set(part):
        if part == "**":
            yield from _matches(place, rest or ["*"])
        for entry in place.iterdir():
            if entry.name.startswith(".") and not part.startswith("."):
                continue
            if part == "**":
                yield from _matches(entry, parts) if is_folder(entry) else []
            elif fnmatch.fnmatchcase(unicodedata.normalize("NFC", entry.name), part):
                yield from _matches(entry, rest)


def _mode(path: Path) -> int:
    """Return the mode of what is at a path; 0 if nothing is, nor can be under such a name."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _in_order(name: str) -> tuple[str, str]:
    """Return what sorts names alike in every Unicode form."""
    return unicodedata.normalize("NFC", name), name
