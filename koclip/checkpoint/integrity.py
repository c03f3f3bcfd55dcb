"""Directories that are whole or known not to be: checksums, and renames that survive a power cut."""

import json
import os
from pathlib import Path

import xxhash

SEAL = "checksums.json"  # written last, of every other file
_BLOCK = 2**20  # bytes read at a time


def seal(directory: Path) -> None:
    """Write the size and checksum of every file in `directory`, and sync all of it to disk."""
    sums = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(file)
        sums[file.relative_to(directory).as_posix()] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
    (directory / SEAL).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    sync(directory / SEAL)
    sync(directory)


def damage(directory: Path) -> str | None:
    """Return what is wrong with a sealed directory, None if nothing is."""
    try:
        sums = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            size = (directory / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _checksum(directory / name) != expected["xxh3_128"]:
                return f"{name} does not have the checksum it was written with"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{SEAL} or a file it lists cannot be read: {error}"
    return None if sums else f"{SEAL} is empty"


def sync(path: Path) -> None:
    """Make a file's content, or a rename within a directory, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
