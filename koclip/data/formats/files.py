"""Find the files of a source by name or pattern, detect their format, and read text in any encoding.

The name of an existing file is never read as a pattern. Patterns are expanded here, not by `datasets`, which would read
the names of the matching files as patterns again.
"""

import codecs
import fnmatch
import io
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from datasets.data_files import DataFilesList

from koclip.config import ConfigError, SourceConfig, locate
from koclip.data.formats import formats, formats_by_suffix
from koclip.storage import read_table

_CHUNK = 1 << 20  # bytes read at once
_SAMPLE = 1 << 14  # bytes used to guess an encoding
_BOMS = {  # in this order: the mark of UTF-32 begins with the mark of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # the bytes of a UTF-8 character after its first byte
_COMMON = frozenset(read_table("common_syllables.tsv")[0][0])
# If two fit equally well, the first is used. cp949 contains EUC-KR; cp1252 is the Latin-1 of Windows.
_CANDIDATES = ("cp949", "cp1252", "shift_jis", "euc_jp", "gb18030", "johab")
_KOREAN = ("cp949", "johab")
_LIKELY = 0.3  # lowest mean weight of the characters; in a wrong encoding it is about 0.1


class FileError(ValueError):
    """A file with wrong content. The message names the file, the line and what to do."""


def read_text(file: str, encoding: str) -> Iterator[str]:
    """Yield the text of a file in parts. A byte-order mark overrides `encoding` and is not part of the text.

    Raises:
        FileError: the file has another encoding.
    """
    with fsspec.open(file, "rb", compression="infer") as opened:
        data = opened.read(_CHUNK)
        name = _marked(data) or encoding
        decoder: Any = codecs.getincrementaldecoder(name)()
        line, beyond_ascii = 1, False
        while True:
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(name)
                line += before.count("\n")
                raise _not_in(name, f"{file}, line {line},", error, beyond_ascii or not before.isascii()) from error
            if not beyond_ascii and not data.isascii():
                _check_not_another(name, encoding, data, text, file)
                beyond_ascii = True
            if "\0" in text and (wide := likely_encoding(data)):
                raise FileError(f"{file} is not {name}; it looks like {wide}: set encoding: {wide} for this source")
            yield text
            if not data:
                return
            line += text.count("\n")
            data = opened.read(_CHUNK)


def read_lines(parts: Iterable[str]) -> Iterator[str]:
    r"""Yield the lines of a text that is given in parts, with their ends: \n, \r\n or \r."""
    held: list[str] = []
    for text in parts:
        end = text.rfind("\n") + 1
        if end:
            yield from io.StringIO("".join([*held, text[:end]]), newline="")
            held = []
        held.append(text[end:])
    yield from io.StringIO("".join(held), newline="")


def decode(data: bytes, encoding: str, place: str) -> str:
    """Return the text in `data`, without its byte-order mark.

    Raises:
        FileError: `data` has another encoding; the message begins with `place`.
    """
    name = _marked(data) or encoding
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise _not_in(name, place, error, False) from error
    _check_not_another(name, encoding, data, text, place)
    return text


def likely_encoding(data: bytes) -> str | None:
    """Return the encoding in which the characters of `data` beyond ASCII are common ones; None if there is none.

    `data` starts at the beginning of a character; its last character may be cut.
    """
    data = data[:_SAMPLE]
    if b"\0" in data:  # half of the bytes of ASCII in UTF-16
        name = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
        text = _decoded(data, name)
        return name if text and "\0" not in text else None
    if not data.isascii() and _decoded(data, "utf-8"):
        return "utf-8"  # text of another encoding is almost never valid UTF-8
    weights = {name: _mean_weight(_decoded(data, name), name not in _KOREAN) for name in _CANDIDATES}
    best = max(weights, key=weights.__getitem__)
    return best if weights[best] >= _LIKELY else None


def _marked(data: bytes) -> str | None:
    """Return the encoding of the byte-order mark; None without a mark."""
    return next((name for mark, name in _BOMS.items() if data.startswith(mark)), None)


def _decoded(data: bytes, encoding: str) -> str:
    """Return the text in data, without a cut last character; "" if it has another encoding."""
    try:
        return str(codecs.getincrementaldecoder(encoding)().decode(data))
    except UnicodeDecodeError:
        return ""


def _mean_weight(text: str, ideographs: bool = True) -> float:
    """Return how common the characters beyond ASCII are in captions, from 0 to 1; Korean ones have no ideographs."""
    weights = [_weight(character, ideographs) for character in text if not character.isascii()]
    return sum(weights) / max(1, len(weights))


def _weight(character: str, ideographs: bool) -> float:
    if character in _COMMON or "\u3041" <= character <= "\u30ff":  # kana
        return 1.0
    if "가" <= character <= "힣":
        return 0.35 if len(character.encode("euc_kr", "ignore")) == 2 else 0.1  # the 2,350 syllables of KS X 1001
    if "\u4e00" <= character <= "\u9fff":
        # The 3,755 most common ones.
        return 0.5 if ideographs and b"\xb0" <= character.encode("gb2312", "ignore") < b"\xd8" else 0.0
    latin = character <= "\u017f" and character.isalpha()
    return 0.5 if latin or "\u2013" <= character <= "\u2026" else 0.0  # dashes and quotation marks


def _check_not_another(name: str, encoding: str, data: bytes, text: str, place: str) -> None:
    """Check that text is not UTF-8 if the user named another encoding, because most encodings accept any bytes."""
    if name != encoding or codecs.lookup(name).name == "utf-8":
        return
    cut = len(data[:3]) - len(data[:3].lstrip(_CONTINUATIONS))  # bytes of a character that began before `data`
    other = _decoded(data[cut:_SAMPLE], "utf-8")
    if other and _mean_weight(other) > _mean_weight(text[:_SAMPLE]):
        raise FileError(f"{place} is not {name}; it looks like utf-8: set encoding: utf-8 for this source")


def _not_in(name: str, place: str, error: UnicodeDecodeError, others_are: bool) -> FileError:
    """Return the error for text at `place` with another encoding; `others_are` in the encoding `name`."""
    wide = b"\0" in error.object  # a byte is not a character or a line end
    start = 0 if wide else error.object.rfind(b"\n", 0, error.start) + 1
    line = error.object[start:].split(b"\n", 1)[0]
    if others_are and not wide:  # setting another encoding would not help
        likely = likely_encoding(line)
        looks = f"it looks like {likely}" if likely else "its encoding is unknown"
        return FileError(f"{place} is not {name}, but the text before it is; {looks}: convert it to {name}")
    likely = likely_encoding(error.object[start:]) or likely_encoding(line)
    looks = f"it looks like {likely}: set encoding: {likely}" if likely else "set encoding to the correct one"
    return FileError(f"{place} is not {name}; {looks} for this source")


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an image folder, as in `datasets`
# Suffixes of pictures. Some kinds cannot be read: their files are listed as skipped.
PICTURES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".tga", ".ico", ".psd", ".svg"),
    }
)
_COMPRESSED = (".gz", ".bz2", ".xz")
_MAGIC = frozenset("*?[")


class SourceError(ConfigError):
    """A source that cannot be read. The message says what was given, what was expected, and what to do."""


def is_remote(path: str) -> bool:
    """Return whether a path is an address such as hf://... or https://..."""
    return "://" in path and not _mode(locate(path))


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; False for a name that no file can have."""
    return stat.S_ISDIR(_mode(Path(path)))


def suffix_of(path: str) -> str:
    """Return the suffix that tells a file's format, in lower case: .csv of A.CSV and of a.csv.gz."""
    name = Path(urlsplit(path).path if path.startswith(("http://", "https://")) else path).name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def file_format(config: SourceConfig) -> str:
    """Return the name of a source's format; `auto` detects it by the names of the files.

    Raises:
        SourceError: no format has that name, or `auto` cannot detect the format.
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
            f"source {config.path!r}: the {len(files)} files (first: {files[0]}) have no common format: their "
            f"suffixes are {suffixes}, expected one of {sorted(known)}; name the files, or set format"
        )
    return str(names.pop())


def _folder_format(path: str) -> str:
    """Return the format of a folder of pictures, or of one that `datasets` or img2dataset wrote; else a SourceError."""
    folder = locate(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "save_to_disk"
    names = [file.name.removesuffix("_stats.json") for file in folder.glob("*_stats.json")]
    if any((folder / f"{name}.parquet").is_file() for name in names):
        return "img2dataset"
    tables: dict[str, str] = {}
    for file in walk(folder):
        suffix = suffix_of(file.name)
        if file.name in METADATA or suffix in PICTURES:
            return "image_folder"
        if suffix in formats_by_suffix():
            tables.setdefault(file.name[file.name.lower().rindex(suffix) :], formats_by_suffix()[suffix])
    if not tables:
        raise SourceError(f"source {path!r} is a folder without pictures; expected an image folder, or a file")
    ending = min(tables)
    raise SourceError(
        f"source {path!r} is a folder of {', '.join(sorted(tables))} files; name them, such as {path}/*{ending}, or "
        f"set format: {tables[ending]} to read all as one split, or format: hub to let datasets find the splits"
    )


def find(path: str, kind: str | None = None) -> list[str]:
    """Return the files that a path or pattern names, absolute and sorted; of a folder, the files of format `kind`.

    Patterns have `*`, `?`, `[...]` and `**`, which do not match hidden names.
    """
    place = locate(path)
    if is_folder(place):
        files = [file for file in walk(place) if kind and formats_by_suffix().get(suffix_of(file.name)) == kind]
    else:
        anchor = Path(path).anchor
        files = list(_matches(Path(anchor), Path(path).parts[bool(anchor) :]))
    return sorted({str(file.absolute()) for file in files}, key=_in_order)


def picture_path(config: SourceConfig, name: str) -> Path:
    """Return the path of a picture that a source names; relative names start at `image_root`, or next to `path`."""
    return locate((Path(config.image_root) if config.image_root else Path(config.path).parent) / name)


def stored_files(config: SourceConfig) -> list[Path]:
    """Return the local files of a source, sorted; none for scenes and remote sources."""
    place = locate(config.path)
    if is_folder(place):
        return list(walk(place))
    return [] if config.path == "scenes" or is_remote(config.path) else list(map(Path, find(config.path)))


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names, without hidden files; links are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_in_order)
        yield from (Path(place, name) for name in sorted(names, key=_in_order) if not name.startswith("."))


def files_of(config: SourceConfig, kind: str) -> DataFilesList | list[str]:
    """Return a source's files with their stamps, for `datasets`; an address stays as it is.

    Raises:
        SourceError: no file matches, or `datasets` cannot open a file of that name.
    """
    if is_remote(config.path):
        return [config.path]
    files = find(config.path, kind)
    if not files:
        raise SourceError(
            f"source {config.path!r} matches no file (from {Path.cwd()}); check the path, "
            "or set format: hub for a Hub data set"
        )
    chained = next((file for file in files if "::" in file), None)
    if chained:
        raise SourceError(f"source {chained!r}: datasets reads '::' in a path as a chain of archives; rename the file")
    # With the path and `mtime` alone, the cache of `datasets` would not notice that a file was replaced.
    return DataFilesList(files, [(str(stamp(file)),) for file in files])


def stamp(path: str | Path) -> tuple[int, int, int]:
    """Return size, mtime and ctime (ns) of a file, which change when its content changes.

    Programs that copy a time stamp (`cp -p`, rsync, tar) set mtime, but not ctime. A change that keeps the size and
    happens within a tick of the file system's clock (milliseconds) goes unnoticed.

    Raises:
        OSError: the file does not exist.
    """
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def printable(name: str) -> str:
    """Return a file name with its bytes that are not UTF-8 replaced: old Korean names are EUC-KR."""
    return os.fsencode(name).decode("utf-8", "replace")


def _matches(place: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files below `place` that match the parts of a pattern; a part that exists as a name is no pattern."""
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
    """Return the mode of a file or folder; 0 if it does not or cannot exist."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _in_order(name: str) -> tuple[str, str]:
    """Return a sort key that gives the same order in every Unicode form."""
    return unicodedata.normalize("NFC", name), name
