"""Read files out of archives. Nothing is extracted to the disk, so that no path in an archive can lead anywhere."""

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from koclip.config import RunError

_MAX_MEMBERS = 1_000_000


def members(archive: Path, pattern: str, max_bytes: int = 2**26) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every regular file of a tar or zip archive whose name matches, in archive order.

    Args:
        archive: A .zip or .whl file, or a tar file with any compression.
        pattern: Regular expression that the whole name has to match.
        max_bytes: Largest size of a matching file, decompressed.

    Raises:
        RunError: the archive is damaged, a matching file is larger than `max_bytes`, or none matches.
    """
    read = _zip_members if archive.suffix in (".zip", ".whl") else _tar_members
    number = 0
    try:
        for name, content in read(archive, re.compile(pattern), max_bytes):
            number += 1
            yield name, content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise RunError(f"{archive}: cannot be read ({error}); delete it and run the command again") from error
    if not number:
        raise RunError(f"{archive}: no file in it is called {pattern}: the source has another layout than koclip knows")


def member(archive: Path, name: str, max_bytes: int = 2**26) -> bytes:
    """Return the content of one file of an archive."""
    return next(members(archive, re.escape(name), max_bytes))[1]


def _tar_members(archive: Path, pattern: re.Pattern[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as opened:
        for number, info in enumerate(opened):
            _check_count(archive, number)
            if info.isreg() and pattern.fullmatch(info.name):
                content = opened.extractfile(info)
                assert content is not None  # it is a regular file
                yield info.name, _bounded(archive, info.name, content.read(max_bytes + 1), max_bytes)


def _zip_members(archive: Path, pattern: re.Pattern[str], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for number, info in enumerate(opened.infolist()):
            _check_count(archive, number)
            if not info.is_dir() and pattern.fullmatch(info.filename):
                with opened.open(info) as content:
                    yield info.filename, _bounded(archive, info.filename, content.read(max_bytes + 1), max_bytes)


def _check_count(archive: Path, number: int) -> None:
    if number >= _MAX_MEMBERS:
        raise RunError(f"{archive}: got more than {_MAX_MEMBERS:,} files, expected fewer")


def _bounded(archive: Path, name: str, content: bytes, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise RunError(f"{archive}: {name} has more than {max_bytes:,} bytes, expected at most that many")
    return content
