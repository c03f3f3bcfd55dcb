"""What a public data set is, and how its tables are written."""

import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from koclip import storage
from koclip.config import RunError
from koclip.text.classes import load_classes

Row = dict[str, Any]
IMAGE = datasets.Image()
TEXT = datasets.Value("string")
CLASS_COLUMNS = {"image": IMAGE, "label": datasets.Value("int32"), "key": TEXT, "name_ko": TEXT, "name_en": TEXT}
_ROWS_PER_GROUP = 100  # rows of photos fit into memory


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that koclip builds from its public source.

    Attributes:
        name: Name on the command line and of the data card.
        summary: What the pictures and texts are.
        size: What is downloaded, and what is written.
        licence: Short form of the terms.
        home: Where the data come from.
        terms: The terms and the attribution of every part, as they are printed and written beside the data.
        research_only: Whether the terms forbid commercial use or redistribution. Such a set has to be accepted by name.
        build: Writes the tables, and the sources' own licence files, into `target`. Downloads are kept in `folder`.
    """

    name: str
    summary: str
    size: str
    licence: str
    home: str
    terms: str
    research_only: bool
    build: Callable[[Path, Path], None]  # folder, target


def build(data_set: DataSet, folder: Path) -> list[Path]:
    """Build a data set: download, check, convert, and put all files in place when all of them are complete.

    Args:
        data_set: The data set.
        folder: Where it goes, such as data/emoji. Downloads are kept in its folder `downloads`.

    Returns:
        The files that were written.

    Raises:
        RunError: a download failed, or is not what it should be. Files of an earlier build are unchanged.
    """
    target = folder / "building"  # on the file system of the data
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed
    try:
        _build(data_set, folder, target)
        (target / "NOTICE.txt").write_text(data_set.terms, encoding="utf-8")
        names = sorted(file.name for file in target.iterdir())
        for name in names:
            storage.put(target / name, folder / name)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return [folder / name for name in names]


def _build(data_set: DataSet, folder: Path, target: Path) -> None:
    """Build, and say which source has changed if its content cannot be read."""
    try:
        target.mkdir(parents=True)
        data_set.build(folder, target)
    except (LookupError, ValueError, UnidentifiedImageError) as error:
        layout = f"its source has another layout than koclip knows ({type(error).__name__}: {error})"
        raise RunError(f"{data_set.name}: {layout}; the downloads are in {folder / 'downloads'}") from error
    except OSError as error:
        raise RunError(f"{data_set.name}: cannot be written to {folder} ({error})") from error


def write_table(file: Path, rows: Iterable[Row], columns: dict[str, Any]) -> None:
    """Write rows as Parquet that `datasets.load_dataset` reads, images included. Equal rows give equal bytes.

    Args:
        file: The new file.
        rows: One dictionary per row, with the keys of `columns`. An image is `{"bytes": ..., "path": ...}`.
        columns: The features of `datasets` by column name.
    """
    schema = datasets.Features(columns).arrow_schema
    remaining = iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(remaining, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def class_facts(name: str) -> list[Row]:
    """Return the columns of `CLASS_COLUMNS` beside the image, for every class of a list of koclip, by label."""
    return [
        {"label": label, "key": entry.key, "name_ko": entry.names["ko"], "name_en": entry.names["en"]}
        for label, entry in enumerate(load_classes(name))
    ]


def on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, its transparent pixels white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def count(rows: Iterable[Row], expected: int, what: str) -> Iterator[Row]:
    """Yield rows, and raise a `RunError` unless there are as many as expected."""
    number = 0
    for number, row in enumerate(rows, 1):  # noqa: B007 - it is compared below
        yield row
    if number != expected:
        raise RunError(
            f"{what}: got {number:,} rows, expected {expected:,}: the source has another content than koclip knows"
        )
