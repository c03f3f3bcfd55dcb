"""How bytes reach the disk: JSON lines, files replaced at once, checksums, and the environment of a number."""

import ctypes
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from koclip import installation

SEAL = "checksums.json"  # written last, of every other file
_BLOCK = 2**20  # bytes read at a time
_HERE, _EXCHANGE = -100, 2  # of renameat2: paths from the working directory, and RENAME_EXCHANGE
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "koclip")


@contextmanager
def atomic(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or a directory at. It takes the place of `path` when the block ends.

    If the block raises, what it wrote is removed. What a killed process wrote is removed by the next write.

    Args:
        path: The file or directory to write.
        shared: Whether several processes may write the same path at once; each then has a temporary path of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"writing-{uuid4().hex}-{path.name}" if shared else f"writing-{path.name}")
    _remove(partial)
    try:
        yield partial
        put(partial, path)
    finally:
        _remove(partial)  # there is none after `put`


def put(partial: Path, path: Path) -> None:
    """Give a complete file or directory its name, in the place of what had this name.

    The content is on disk before its name is, so that a reader, or a power cut, finds the old content or the new one.
    Both have to be on one file system. Where that cannot swap two directories, the old one is first renamed to
    `replaced-<name>`: a process that is killed right then leaves no `path`, but the old directory is complete.
    """
    for file in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        sync(file)
    replaced = path.with_name(f"replaced-{path.name}")
    if path.is_dir():
        if _swap(partial, path):
            sync(path.parent)
            _remove(partial)  # the old content
            return
        _remove(replaced)
        path.rename(replaced)
    partial.replace(path)
    sync(path.parent)
    _remove(replaced)


def _swap(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return whether this system can (Linux can, on most file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, bytes(first), _HERE, bytes(second), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table in `koclip/assets`, without empty lines and lines that begin with "# "."""
    text = resources.files("koclip").joinpath("assets", name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line and not line.startswith("# ")]


def append_lines(file: Path, items: Iterable[dict[str, Any]]) -> None:
    """Append a line per item."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the items of a log; a last line that was cut off is no item. A missing log is empty."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")  # str.splitlines would also split at U+2028 in a key
    return [json.loads(line) for line in lines]


def keep_lines(file: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the wanted items in a log."""
    if file.exists():
        replace_text(
            file, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in read_lines(file) if wanted(item))
        )


def replace_text(file: Path, text: str) -> None:
    """Give a file another content; whoever reads it sees the old one or the new one."""
    with atomic(file) as partial:
        partial.write_text(text, encoding="utf-8")


def seal(directory: Path) -> None:
    """Write the size and checksum of every file in `directory`."""
    sums = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        sums[file.relative_to(directory).as_posix()] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
    (directory / SEAL).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


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


def environment(num_processes: int = 1) -> dict[str, Any]:
    """Return what a number depends on: versions, hardware, the commit of the code."""
    import torch  # takes seconds, and nothing else here needs it

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": installation.commit(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "num_processes": num_processes,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
