"""The files of a folder that may be pictures, and all others, each with the reason why it is none."""

import os
from pathlib import Path

from koclip.data.sources import Skip
from koclip.data.transforms import KINDS, suffixes


def list_folder(root: Path) -> tuple[list[Path], list[Skip]]:
    """Return the files in a folder and the folders in it whose suffix is a picture's, or that have none, sorted.

    Returns:
        Their paths, and what else is there, by its path in the folder: files of other suffixes, what is no file, and
        folders that are not entered.
    """
    paths: list[Path] = []
    left_out: list[Skip] = []
    known = suffixes()

    def leave_out(path: Path, reason: str) -> None:
        left_out.append(Skip(printable(path.relative_to(root).as_posix()), reason))

    def closed(error: OSError) -> None:
        leave_out(Path(error.filename), f"{type(error).__name__}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=closed):
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink():
                leave_out(path, "a link to a folder, which is not entered: index that folder by itself")
        for path in (Path(folder, name) for name in files):
            if path.suffix.lower() not in known and path.suffix.strip("."):
                leave_out(path, f"{path.suffix} is no suffix of the kinds that are read: {KINDS}")
            elif not path.is_file():
                leave_out(path, "no file: a link to nothing, or a device")
            else:
                paths.append(path)
    return sorted(paths), sorted(left_out)


def printable(name: str) -> str:
    """Return a file name without the bytes in it that are not UTF-8: old Korean names are EUC-KR."""
    return os.fsencode(name).decode("utf-8", "replace")
