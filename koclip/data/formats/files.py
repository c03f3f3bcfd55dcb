"""Find the files of a source, by name or pattern, and their format; read text in any encoding.

A file that exists is taken by its name, whatever characters are in it; patterns are read here, once: `datasets` would
read them again in the names that they match. It gets a list of files, with their sizes and times of change.
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

_CHUNK = 1 << 20  # bytes read at once
_SAMPLE = 1 << 14  # bytes that an encoding is guessed of
_BOMS = {  # in this order: the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # all bytes of a character in UTF-8 but the first
# The 500 syllables that make up 96% of Korean text (reviews, news, translated sentences).
_COMMON = frozenset(
    "가각간갈감갔강갖같개객거건걸검것게겠겨격견결경계고골곳공과관광괜교구국군권귀규그극근글금급기긴길김까깨께꾸꿈끔끝끼낌나난날남났낮내냈냐냥너널넘네녀년노놀농높놓누눈뉴느는늘능늦니닌님다단달담답당대더던데"
    "도독돈돌동돼됐되된될두둘뒤드득든들듯등디따때떠떤떨떻또뛰뜻라락란람랐랑래랜러런럼럽렇레려력련렸령로록론롭료루류르른를름리린릴림립링마막만많말망맞매맨머먹먼멋메며면명몇모목몰못무문물뭐뭔미민믿밀밌바박밖"
    "반받발밝밤방배백버번벌범법베벽변별병보복본볼봐봤부북분불브블비빠빨뿐쁘사산살상새색생서석선설성세센션셨소속손송수숙순술쉬쉽스슨슬습승시식신실싫심십싶싸써쓰씨씬아악안앉않알았앞애액야약양어억언얼엄업없엇"
    "었에엔엘여역연열였영예오온올와완왔왕왜외요욕용우운울움웃워원월웠웨위유육으은을음응의이인일읽임입있자작잔잘잠잡장재쟁저적전절점접정제져졌조족존좀종좋죄죠주죽준줄중줘즈즐증지직진질집짓짜째쪽찍차착찮찰참"
    "창찾채책처천철청체쳐쳤초총최추축출충취츠층치친침카캐커컴케코크큰클큼키타탁탄탈태택터턴테토톰통투트특틀티파판팔패퍼페편평포폭표품프플피필하학한할함합항해했행향허험혀현협형호혼화확환활황회획후훨흥희히힘"
)
# Of two that fit equally well the first is taken. cp949 holds EUC-KR; cp1252 is the Latin-1 of Windows.
_CANDIDATES = ("cp949", "cp1252", "shift_jis", "euc_jp", "gb18030", "johab")
_KOREAN = ("cp949", "johab")
_LIKELY = 0.3  # least mean weight of the characters; in a wrong encoding it is about 0.1


class FileError(ValueError):
    """A file that does not hold what it should. The message names the file, the line and what to do."""


def read_text(file: str, encoding: str) -> Iterator[str]:
    """Yield the text of a file in parts, without its byte-order mark. A mark decides before `encoding` does.

    Raises:
        FileError: the file is not in this encoding.
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
    r"""Yield the lines of a text that comes in parts, with their ends: \n, \r\n or \r."""
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
        FileError: it is not in this encoding; the message begins with `place`.
    """
    name = _marked(data) or encoding
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise _not_in(name, place, error, False) from error
    _check_not_another(name, encoding, data, text, place)
    return text


def likely_encoding(data: bytes) -> str | None:
    """Return the encoding in which the characters beyond ASCII are usual ones; None if there is none.

    Args:
        data: Text from the beginning of a character on; its last character may be cut.
    """
    data = data[:_SAMPLE]
    if b"\0" in data:  # half of the bytes of ASCII in UTF-16
        name = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
        text = _decoded(data, name)
        return name if text and "\0" not in text else None
    if not data.isascii() and _decoded(data, "utf-8"):
        return "utf-8"  # next to no text of another encoding is UTF-8 by chance
    weights = {name: _mean_weight(_decoded(data, name), name not in _KOREAN) for name in _CANDIDATES}
    best = max(weights, key=weights.__getitem__)
    return best if weights[best] >= _LIKELY else None


def _marked(data: bytes) -> str | None:
    """Return the encoding that a byte-order mark names; None without a mark."""
    return next((name for mark, name in _BOMS.items() if data.startswith(mark)), None)


def _decoded(data: bytes, encoding: str) -> str:
    """Return the text in data, without a character that is cut at its end; "" if it is not in this encoding."""
    try:
        return str(codecs.getincrementaldecoder(encoding)().decode(data))
    except UnicodeDecodeError:
        return ""


def _mean_weight(text: str, ideographs: bool = True) -> float:
    """Return how usual the characters beyond ASCII are in captions, from 0 to 1; ideographs are none in Korean ones."""
    weights = [_weight(character, ideographs) for character in text if not character.isascii()]
    return sum(weights) / max(1, len(weights))


def _weight(character: str, ideographs: bool) -> float:
    if character in _COMMON or "\u3041" <= character <= "\u30ff":  # kana
        return 1.0
    if "가" <= character <= "힣":
        return 0.35 if len(_encoded(character, "euc_kr")) == 2 else 0.1  # the 2,350 syllables of KS X 1001
    if "\u4e00" <= character <= "\u9fff":
        # The 3,755 most used.
        return 0.5 if ideographs and b"\xb0" <= _encoded(character, "gb2312") < b"\xd8" else 0.0
    latin = character <= "\u017f" and character.isalpha()
    return 0.5 if latin or "\u2013" <= character <= "\u2026" else 0.0  # dashes and quotation marks


def _encoded(character: str, encoding: str) -> bytes:
    return character.encode(encoding, "ignore")


def _check_not_another(name: str, encoding: str, data: bytes, text: str, place: str) -> None:
    """Make sure that text read in an encoding that somebody named is not UTF-8: most of them take any bytes.

    Raises:
        FileError: it is UTF-8.
    """
    if name != encoding or codecs.lookup(name).name == "utf-8":
        return
    cut = len(data[:3]) - len(data[:3].lstrip(_CONTINUATIONS))  # of a character that began before
    other = _decoded(data[cut:_SAMPLE], "utf-8")
    if other and _mean_weight(other) > _mean_weight(text[:_SAMPLE]):
        raise FileError(f"{place} is not {name}; it looks like utf-8: set encoding: utf-8 for this source")


def _not_in(name: str, place: str, error: UnicodeDecodeError, others_are: bool) -> FileError:
    """Return the error for text at `place` that is not in an encoding that `others_are` in."""
    wide = b"\0" in error.object  # bytes are no characters, nor are line ends
    start = 0 if wide else error.object.rfind(b"\n", 0, error.start) + 1
    line = error.object[start:].split(b"\n", 1)[0]
    if others_are and not wide:  # setting another encoding would not help
        likely = likely_encoding(line)
        looks = f"it looks like {likely}" if likely else "its encoding is not known"
        return FileError(f"{place} is not {name}, but text before it is; {looks}: write it in {name}")
    likely = likely_encoding(error.object[start:]) or likely_encoding(line)
    looks = f"it looks like {likely}: set encoding: {likely}" if likely else "set encoding to the one it is in"
    return FileError(f"{place} is not {name}; {looks} for this source")


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
