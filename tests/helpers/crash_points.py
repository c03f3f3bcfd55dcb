"""Make every file operation of some work the last one in turn, as a process that dies or a power cut does.

Counted are: open, write, fsync, rename and replace, swap, unlink, mkdir, rmdir, and the writes of safetensors. The last
operation is not done; of a write, the first half is. All operations after it are refused. Then the power is cut: of
files that were not synced since they were written, the first half is left.
"""

import builtins
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from koclip import storage

_EVENTS = {"os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}


class SimulatedCrash(BaseException):
    """The process is dead: nothing may catch this."""


class Disk:
    """Counts the operations on files below a folder; the one with number `last` raises, and all after it."""

    def __init__(self, root: Path, last: int | None = None) -> None:
        self.root, self.operations, self._last = root, list[str](), last
        self._synced = {file.stat().st_ino for file in files(root)}

    def count(self, operation: str) -> None:
        """Note an operation that is about to be done; raise if it must not be."""
        number = len(self.operations)
        self.operations.append(operation)
        if self._last is not None and number >= self._last:
            raise SimulatedCrash(f"{number}: {operation}")

    def holds(self, path: Any) -> bool:
        """Tell whether a path is below the folder; one that is relative to an open folder is."""
        return isinstance(path, (str, bytes, Path)) and (
            not Path(os.fsdecode(path)).is_absolute() or Path(os.fsdecode(path)).is_relative_to(self.root)
        )

    def written(self, path: Any) -> None:
        """Note that a file has content that is not synced."""
        self._synced.discard(Path(path).stat().st_ino)

    def synced(self, handle: int) -> None:
        """Note that all content of a file is on disk."""
        self._synced.add(os.fstat(handle).st_ino)

    def cut_power(self) -> None:
        """Take from the files what was not synced."""
        for file in files(self.root):
            if file.stat().st_ino not in self._synced:
                os.truncate(file, file.stat().st_size // 2)


class _File:
    """A file opened to be written, whose writes are counted."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        try:
            self._disk.count("write")
        except SimulatedCrash:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return int(self._file.write(data))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)


_disk: Disk | None = None  # that is watched now


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _disk is None:
        return
    if event == "open" and _disk.holds(args[0]):
        _disk.count("open")
    elif event in _EVENTS and _disk.holds(args[0]):
        _disk.count(_EVENTS[event])


sys.addaudithook(_audit)  # cannot be removed: it does nothing while no disk is watched


@contextmanager
def watching(disk: Disk) -> Iterator[None]:
    """Count what is done in the block."""
    global _disk
    open_file, sync, swap, serialize = io.open, os.fsync, storage._swap, safetensors.torch.serialize_file

    def opening(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = open_file(path, mode, *args, **options)
        if not disk.holds(path) or not set(mode) & set("wax+"):
            return file
        disk.written(path)
        return _File(file, disk)

    def syncing(handle: int) -> None:
        disk.count("fsync")
        sync(handle)
        disk.synced(handle)

    def swapping(first: Path, second: Path) -> bool:
        disk.count("swap")
        return swap(first, second)

    def serializing(tensors: Any, path: Any, metadata: Any = None) -> None:
        disk.count("open")
        serialize(tensors, path, metadata)
        disk.written(path)
        try:
            disk.count("write")
        except SimulatedCrash:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opening)
        patch.setattr(builtins, "open", opening)
        patch.setattr(os, "fsync", syncing)
        patch.setattr(storage, "_swap", swapping)
        patch.setattr(safetensors.torch, "serialize_file", serializing)
        _disk = disk
        try:
            yield
        finally:
            _disk = None


def crash_everywhere(before: Path, work: Callable[[Path], object], check: Callable[[Path], object]) -> int:
    """Do some work once for each of its operations, dying in it; return their number.

    Args:
        before: What is on disk before the work.
        work: Takes a copy of that folder.
        check: Looks at what is left in the copy, and fails if that is neither the old nor the new.
    """
    root = before.parent / "crashed"

    def copy() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)

    copy()
    whole = Disk(root)
    with watching(whole):
        work(root)
    assert {"open", "write", "fsync"} <= set(whole.operations)  # else nothing was watched
    for last in range(len(whole.operations)):
        copy()
        disk = Disk(root, last)
        with watching(disk), pytest.raises(SimulatedCrash):
            work(root)
        assert disk.operations[: last + 1] == whole.operations[: last + 1]
        disk.cut_power()
        check(root)
    return len(whole.operations)


def files(root: Path) -> list[Path]:
    """Return the files below a folder."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def tree(root: Path) -> dict[str, bytes] | None:
    """Return the content of every file below a folder; None if there is no such folder."""
    return {str(file.relative_to(root)): file.read_bytes() for file in files(root)} if root.exists() else None
