"""Read tables from CSV, TSV and JSON files. Cells of CSV are text; those of JSON are what JSON says, unchanged.

`datasets` reads such files with pandas and Arrow, which make numbers, dates and missing values of what looks like one,
take the first column for an index where a line has one field more, and let some broken text pass.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from koclip import storage
from koclip.config import SourceConfig
from koclip.data.formats.columns import column_names, dig, has_column
from koclip.data.formats.encodings import FileError, read_lines, read_text
from koclip.data.formats.files import SourceError, identity, is_remote, suffix_of
from koclip.data.formats.json_layouts import ONE, Layout, conversion, layout_of

_PEEKED = 1_000  # rows that tell the columns of a stream
_BATCH = 10_000  # rows written at once
_VERSION = 2  # of the files that are kept
_JSON = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is a missing value
csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072


class Task(NamedTuple):
    """What is read and how. What is kept of it on disk is known by it."""

    path: str
    read: Callable[[Any, "Task"], Iterator[Mapping[str, Any]]]  # yields the rows of a file
    files: tuple[Any, ...]
    contents: tuple[str, ...]  # what differs when a file does
    encoding: str
    header: tuple[str, ...] | None  # of CSV files that have none
    images: tuple[str, ...]  # columns of which a file has one or more
    columns: tuple[str, ...]  # all the others that are wanted
    version: int = _VERSION

    @property
    def names(self) -> list[str]:
        """The columns of the table."""
        return list(dict.fromkeys([*self.images, *self.columns, "id"]))


def open_text(config: SourceConfig, kind: str, files: Sequence[str]) -> datasets.Dataset | datasets.IterableDataset:
    """Open files as a table of the columns that a source names, and `id`.

    Args:
        config: The source.
        kind: csv (TSV too), or json and annotations (one object per line, or one array of objects).
        files: Their paths, or one address, which may be a pattern.

    Raises:
        SourceError: no row has one of the columns.
        FileError: a file is broken, not in its encoding or of another layout.
    """
    if is_remote(files[0]):
        files = [opened.full_name for opened in fsspec.open_files(files[0])]
    return open_records(
        config, csv_records if kind == "csv" else json_records, files, [_content(file) for file in files]
    )


def open_records(
    config: SourceConfig,
    read: Callable[[Any, Task], Iterator[Mapping[str, Any]]],
    files: Sequence[Any],
    contents: Sequence[str],
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the rows of files as a table of the columns that a source names, and `id`.

    Args:
        config: The source.
        read: Yields the rows of one of the files.
        files: What `read` takes.
        contents: For each file, what differs when its content does.

    Raises:
        SourceError: no row has one of the columns.
        FileError: a file cannot be read.
    """
    # `datasets` has no split of the name `all`.
    asked = re.sub(r"^all(?=\[|$)", "train", config.split)
    split = asked.split("[")[0]
    columns = [*([config.label] if config.label else []), *config.captions.values(), *(config.where or {})]
    task = Task(
        path=config.path,
        read=read,
        files=tuple(files),
        contents=tuple(contents),
        encoding=config.encoding,
        header=tuple(config.columns) if config.columns else None,
        images=tuple(config.images),
        columns=tuple(columns),
    )
    if config.streaming:
        if split != asked:
            raise FileError("a stream cannot be cut: name the split without brackets, or set streaming: false")
        for _ in _checked(itertools.islice(_records(files, task), _PEEKED), task):
            pass
        options = {"gen_kwargs": {"files": list(files), "task": task}, "split": datasets.NamedSplit(split)}
        return datasets.IterableDataset.from_generator(_rows, **options)
    table = datasets.Dataset.from_file(str(_kept(task)))
    parts = datasets.ReadInstruction.from_spec(asked).to_absolute({split: len(table)})
    places = itertools.chain.from_iterable(range(part.from_, part.to) for part in parts)
    return (table if split == asked else table.select(places)).with_transform(_decoded)


def _content(file: str) -> str:
    """Return what differs when a file's content does."""
    if not is_remote(file):
        return identity(file)
    filesystem, path = fsspec.core.url_to_fs(file)
    return str(filesystem.ukey(path))


def _rows(files: Sequence[Any], task: Task) -> Iterator[dict[str, Any]]:
    """Yield the cells that are wanted of every row."""
    for record in _records(files, task):
        yield {name: dig(record, name) for name in task.names}


def _kept(task: Task) -> Path:
    """Return an Arrow file of the rows, with each cell as JSON: a column may hold anything. It is made once."""
    read = f"{task.read.__module__}.{task.read.__qualname__}"
    key = xxh3_128_hexdigest(repr((read, task._replace(read=None))).encode("utf-8", "replace"))  # type: ignore[arg-type]
    file = Path(datasets.config.HF_DATASETS_CACHE, "koclip", f"{key}.arrow")
    if file.exists():
        return file
    schema = pa.schema([(name, pa.string()) for name in task.names])
    with (
        storage.atomic(file, shared=True) as partial,  # several processes may write it
        pa.OSFile(str(partial), "wb") as opened,
        pa.ipc.new_stream(opened, schema) as writer,
    ):
        records = _checked(_records(task.files, task), task)
        records = iter(tqdm(records, f"reading {task.path}", unit=" rows", delay=5))
        while batch := list(itertools.islice(records, _BATCH)):
            columns = [[json.dumps(dig(record, name)) for record in batch] for name in task.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return file


def _decoded(columns: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    return {name: [json.loads(cell) for cell in cells] for name, cells in columns.items()}


def _checked(records: Iterable[Mapping[str, Any]], task: Task) -> Iterator[Mapping[str, Any]]:
    """Pass records on; at their end, make sure that each column was in one of them."""
    missing = {task.images, *((column,) for column in task.columns)} - {()}
    names: dict[str, None] = {}
    for number, record in enumerate(records):
        if missing:
            missing = {either for either in missing if not any(has_column(record, column) for column in either)}
            names |= dict.fromkeys(column_names(record) if number < _PEEKED else ())
        yield record
    if missing and names:
        columns = sorted(itertools.chain.from_iterable(missing))
        raise SourceError(f"source {task.path!r} has no column {columns}; its columns are {sorted(names)}")


def _records(files: Sequence[Any], task: Task) -> Iterator[Mapping[str, Any]]:
    for file in files:
        yield from task.read(file, task)


def csv_records(file: str, task: Task) -> Iterator[Mapping[str, Any]]:
    """Yield the lines of a CSV or TSV file by column.

    In tab-separated files quotes are text: taken for CSV's, one that is not closed swallows the lines after it.
    """
    tabs = suffix_of(file) == ".tsv"
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    lines = csv.reader(read_lines(read_text(file, task.encoding)), strict=True, **form)  # type: ignore[arg-type]
    header: Sequence[str] | None = task.header
    line = 1
    while True:
        try:
            fields = next(lines, None)
        except csv.Error as error:
            advice = "in a field in quotes, a quote is written twice; in a file named .tsv, quotes are text"
            raise FileError(f"{file}, line {line}: {error}; {advice}") from error
        if fields is None:
            break
        if header is None:
            header = fields
            repeated = {name for name in fields if fields.count(name) > 1} & set(task.columns)
            if repeated:
                raise FileError(f"{file} has the column {min(repeated)!r} twice; give each a name of its own")
        elif "".join(fields).strip() or len(fields) == len(header) > 1:  # no blank line
            if len(fields) != len(header):
                advice = "a field that holds the separator or a line break must be in quotes"
                raise FileError(f"{file}, line {line}: {len(fields)} fields, expected {len(header)}; {advice}")
            yield dict(zip(header, fields, strict=True))
        line = lines.line_num + 1
    if header is None:
        raise FileError(f"{file} is empty")


def json_records(file: str, task: Task) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a JSON array, or of a file with one on each line."""
    lines = (
        (number, line) for number, line in enumerate(read_lines(read_text(file, task.encoding)), 1) if line.strip()
    )
    number, first = next(lines, (0, ""))
    if not first:
        raise FileError(f"{file} is empty")
    if first.lstrip().startswith("["):
        items = _parsed("".join([first, *(line for _, line in lines)]), f"{file}")
        yield from (_object(item, f"{file}, item {place}") for place, item in enumerate(items, 1))
        return
    try:
        record = _JSON.decode(first.strip())
    except json.JSONDecodeError as error:
        if error.pos < len(first.strip()):
            raise FileError(f"{file}, line {number} is not JSON: {error.msg}") from error
        document = _object(_parsed("".join([first, *(line for _, line in lines)]), file), file)
        raise _other_layout(_layout(document, task) or ONE, file, task) from error
    record = _object(record, f"{file}, line {number}")
    following = next(lines, None)
    layout = _layout(record, task) if following is None else None
    if layout:
        raise _other_layout(layout, file, task)
    yield record
    for number, line in itertools.chain([following] if following else [], lines):
        place = f"{file}, line {number}"
        yield _object(_parsed(line, place), place)


def _parsed(text: str, place: str) -> Any:
    try:
        return _JSON.decode(text.strip())
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{place} is not JSON: {error}") from error


def _object(item: Any, place: str) -> Mapping[str, Any]:
    """Return an object as it is, and a text as one with a column `text`."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        raise FileError(f"{place} is {json.dumps(item, ensure_ascii=False)[:60]}, expected an object")
    return item


def _layout(document: Mapping[str, Any], task: Task) -> Layout | None:
    images = [dig(document, image) for image in task.images if has_column(document, image)]

    def has_columns(record: Mapping[str, Any]) -> bool:
        image = not task.images or any(has_column(record, image) for image in task.images)
        return image and all(has_column(record, column) for column in task.columns)

    return layout_of(document, images, has_columns)


def _other_layout(layout: Layout, file: str, task: Task) -> FileError:
    return FileError(f"{file} cannot be read as it is: {conversion(layout, task.path, task.files, task.encoding)}")
