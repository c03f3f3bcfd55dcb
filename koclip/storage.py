"""Files: atomic writes, JSON lines, checksums, tables in assets, and the facts of environment.json."""

import ctypes
import hashlib
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

SEAL = "checksums.json"  # written last; lists every other file
_HERE, _EXCHANGE = -100, 2  # renameat2: AT_FDCWD and RENAME_EXCHANGE
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "koclip")


@contextmanager
def atomic(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or directory, which replaces `path` when the block ends.

    If the block raises, its temporary files are removed. The next write removes those of a killed process. If `shared`,
    several processes may write the same path at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"writing-{uuid4().hex}-{path.name}" if shared else f"writing-{path.name}")
    _remove(partial)
    try:
        yield partial
        put(partial, path)
    finally:
        _remove(partial)


def put(partial: Path, path: Path) -> None:
    """Rename a complete file or directory to `path` and replace what is there; both must be on one file system.

    The content is on disk before the rename, so that a reader finds the old or the new content, also after a power cut.
    If the file system cannot swap two directories, the old one is first renamed to `replaced-<name>`: a process that is
    killed at this moment leaves no `path`, but the old directory is complete.
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
    """Swap two paths in one step; return whether the system supports it (Linux does, on most file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, bytes(first), _HERE, bytes(second), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table in `koclip/assets`, without empty lines and lines that begin with "# "."""
    text = resources.files("koclip").joinpath("assets", name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line and not line.startswith("# ")]


def append_lines(file: Path, items: Iterable[dict[str, Any]]) -> None:
    """Append one line per item to a log."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the items of a log without an incomplete last line; a missing log has none."""
    if not file.exists():
        return []
    *lines, _ = file.read_text(encoding="utf-8").split("\n")  # str.splitlines would also split at U+2028 in a key
    return [json.loads(line) for line in lines]


def keep_lines(file: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the unwanted items from a log."""
    if file.exists():
        with atomic(file) as partial:
            append_lines(partial, filter(wanted, read_lines(file)))


def replace_text(file: Path, text: str) -> None:
    """Replace the content of a file atomically."""
    with atomic(file) as partial:
        partial.write_text(text, encoding="utf-8")


def seal(directory: Path) -> None:
    """Write the size and checksum of every file in `directory`."""
    sums = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        sums[file.relative_to(directory).as_posix()] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
    (directory / SEAL).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def damage(directory: Path) -> str | None:
    """Return a description of the damage to a sealed directory; None if it is intact."""
    try:
        sums = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            size = (directory / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _checksum(directory / name) != expected["xxh3_128"]:
                return f"{name} has another checksum than when it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{SEAL} or a file it lists cannot be read: {error}"
    return None if sums else f"{SEAL} is empty"


def sync(path: Path) -> None:
    """Write a file's content, or the renames in a directory, to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def cpu_name() -> str:
    """Return the name of the CPU, or its architecture where the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(num_processes: int = 1) -> dict[str, Any]:
    """Return the facts that results depend on: versions, hardware, the commit of the code."""
    import torch  # takes seconds, and nothing else here needs it

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": installation.commit(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in _PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "num_processes": num_processes,
        "command": installation.command(sys.argv),
    }
