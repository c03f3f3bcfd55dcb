"""Read folders of pictures.

`image_folder` has the layout of `datasets`: metadata files next to the pictures, or a folder for each class.
`pictures` is any folder; each picture is a row without captions.

A picture that is not in the metadata becomes a row without captions, so that it is listed as skipped. `datasets` drops
it, and reads several metadata files in random order.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets.data_files import DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME
from fsspec.utils import glob_translate

from koclip.config import SourceConfig, locate
from koclip.data.formats import Format, MapSource, Row, Skip, Table
from koclip.data.formats.files import METADATA, PICTURES, SourceError, is_folder, printable, stamp, walk
from koclip.data.formats.text_files import Task, csv_records, json_records, open_records
from koclip.data.transforms import KINDS, suffixes

_METADATA = tuple(f"/{name}" for name in METADATA)
# JPEG, PNG, GIF, BMP, WebP, TIFF, JPEG 2000, JPEG XL, and AVIF and HEIC.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cj|\xff\x4f\xff|\xff\x0a|....ftyp", re.DOTALL
)
_PART = 1_000  # pictures without metadata that are read at a time
_NAMED = 5  # most files that an error names

Record = Mapping[str, Any]
Picture = tuple[str, str | None]  # path and class


def open_folder(config: SourceConfig, seed: int = 0) -> Table:
    """Open an image folder as a table: `image`, and the columns of the metadata or `label`, the name of the folder.

    A column `left_file_name` of the metadata becomes the image column `left`.

    Raises:
        SourceError: the folder or the split does not exist, or a file belongs to no split or to several.
        FileError: a metadata file cannot be read.
    """
    folder = locate(config.path)
    if not is_folder(folder):
        raise SourceError(f"source {config.path!r} is not a folder; expected an image folder")
    root = f"{folder.absolute()}/"
    names = [str(file.absolute()).removeprefix(root) for file in walk(folder) if _belongs(file)]
    if not names:
        raise SourceError(f"source {config.path!r} is a folder without pictures; expected an image folder")
    files = [root + name for name in _of_split(names, config)]
    metadata = [file for file in files if file.endswith(_METADATA)]
    pictures = _with_classes([file for file in files if not file.endswith(_METADATA)])
    size = len(pictures) if metadata else _PART
    parts = [tuple(pictures[start : start + size]) for start in range(0, len(pictures), size or 1)]
    contents = [*(str(stamp(file)) for file in metadata), *([""] * len(parts))]
    return open_records(config, _read, [*metadata, *parts], contents)


def _belongs(file: Path) -> bool:
    """Return whether a file is metadata or a picture, by its suffix, or by its first bytes if it has none."""
    if file.name in METADATA or file.suffix:
        return file.name in METADATA or file.suffix.lower() in PICTURES
    try:
        with file.open("rb") as opened:
            return bool(_SIGNATURE.match(opened.read(16)))
    except OSError:
        return True  # a file that cannot be read is listed as skipped later


def _of_split(names: Sequence[str], config: SourceConfig) -> Sequence[str]:
    """Return the files of the source's split, by the rules of `datasets`."""
    wanted = config.split.split("[")[0]
    splits = {"train": list(names)}
    for patterns in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        matches = {str(split): re.compile("|".join(map(glob_translate, patterns[split]))).match for split in patterns}
        members = {split: [name for name in names if match(name)] for split, match in matches.items()}
        if any(members.values()):
            splits = {split: part for split, part in members.items() if part}
            break
    if wanted == "all":
        return names
    uses = Counter(name for part in splits.values() for name in part)
    wrong = [name for name in names if uses[name] != 1]
    if wrong:
        raise SourceError(
            f"source {config.path!r}: its file names give the splits {sorted(splits)}, but {len(wrong)} files belong "
            f"to none or to several, such as {wrong[:_NAMED]}; name the folder of one split, or set split: all"
        )
    if wanted not in splits:
        raise SourceError(f"source {config.path!r} has no split {wanted!r}; it has {sorted(splits)}, and all")
    return splits[wanted]


def _with_classes(files: Sequence[str]) -> list[Picture]:
    """Return pictures with the names of their folders as classes, if there are several folders of equal depth."""
    places = [file.rpartition("/") for file in files]
    folders = {folder for folder, _, name in places if "." in name}
    if len(folders) < 2 or len({folder.count("/") for folder in folders}) > 1:
        return [(file, None) for file in files]
    classes = {folder: folder.rpartition("/")[2] for folder in folders}
    return [(file, classes.get(folder)) for file, (folder, _, _) in zip(files, places, strict=True)]


def _read(part: str | Sequence[Picture], task: Task) -> Iterator[Record]:
    """Yield the rows of a metadata file; or of pictures that are in no metadata file."""
    if isinstance(part, str):
        yield from _metadata(part, task)
        return
    metadata = [file for file in task.files if isinstance(file, str)]
    if not metadata:
        yield from (
            {"image": picture} if label is None else {"image": picture, "label": label} for picture, label in part
        )
        return
    named = {image: set[str]() for image in task.images}
    for row in (row for file in metadata for row in _metadata(file, task)):
        for image in named.keys() & row.keys():
            named[image].add(_same(row[image] or ""))
    column = next((image for image, pictures in named.items() if pictures), None)
    known = set[str]().union(*named.values())
    yield from ({column: picture} for picture, _ in part if column and _same(picture) not in known)


def _metadata(file: str, task: Task) -> Iterator[Record]:
    """Yield the rows of a metadata file, with the names of the pictures replaced by their paths."""
    columns = {image: "file_name" if image == "image" else f"{image}_file_name" for image in task.images}
    task = task._replace(files=(file,), images=tuple(columns.values()))
    rows = csv_records(file, task) if file.endswith(".csv") else json_records(file, task)
    for row in _parquet_records(file) if file.endswith(".parquet") else rows:
        names = {image: row[column] for image, column in columns.items() if column in row}
        folder = Path(file).parent
        paths = {key: str(folder / name) if isinstance(name, str) and name else None for key, name in names.items()}
        yield {**row, **paths}


def _parquet_records(file: str) -> Iterator[Record]:
    for batch in pq.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _same(path: str) -> str:
    """Return a text that is equal for different spellings of a path."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


class PicturesSource(MapSource):
    """The pictures of a folder and its subfolders, as rows without captions.

    Pictures are files with a suffix of a readable kind, or without a suffix. `left_out` lists all other files.

    Raises:
        SourceError: the folder has no picture.
    """

    def __init__(self, config: SourceConfig, seed: int = 0) -> None:
        self.config = config
        self._root = locate(config.path)
        self.paths, left_out = _list_folder(self._root)
        self.left_out = [skip._replace(source=printable(config.path)) for skip in left_out]
        if not self.paths:
            raise SourceError(
                f"images: got {config.path!r}, expected a folder of pictures ({KINDS}); skipped: {left_out[:_NAMED]}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, indices: Sequence[int], images: bool = True) -> list[Row]:
        """Return rows with the paths of the pictures; the keys are the paths inside the folder."""
        paths = [self.paths[index] for index in indices]
        return [Row(path, {}, printable(path.relative_to(self._root).as_posix())) for path in paths]


def _list_folder(root: Path) -> tuple[list[Path], list[Skip]]:
    """Return the pictures of a folder, sorted, and all other files, each with the reason; links are not followed."""
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
                leave_out(path, "a link to a folder, which is not followed: index that folder separately")
        for path in (Path(folder, name) for name in files):
            if path.suffix.lower() not in known and path.suffix.strip("."):
                leave_out(path, f"suffix {path.suffix}: expected a picture of the kinds {KINDS}")
            elif not path.is_file():
                leave_out(path, "not a file: a broken link, or a device")
            else:
                paths.append(path)
    return sorted(paths), sorted(left_out)


FORMATS = {"image_folder": Format(open_folder, encoded=True), "pictures": Format(PicturesSource)}
