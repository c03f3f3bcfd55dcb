"""Read tables from CSV, TSV and JSON files. CSV cells stay text; JSON values stay unchanged.

`datasets` reads such files with pandas and Arrow, which convert cells to numbers, dates and missing values, use the
first column as an index if a line has one field more, and accept some broken text.
"""

import csv
import dataclasses
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
import yaml
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from koclip import storage
from koclip.config import SourceConfig
from koclip.data.formats import Format, Table, column_names, dig, has_column
from koclip.data.formats.files import (
    FileError,
    SourceError,
    files_of,
    is_remote,
    read_lines,
    read_text,
    stamp,
    suffix_of,
)

_PEEKED = 1_000  # rows of a stream that are read to find its columns
_BATCH = 10_000  # rows written at once
_VERSION = 2  # of the cached files
_JSON = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is a missing value
csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072


class Task(NamedTuple):
    """What to read, and how. Its hash is the name of the file that caches the rows."""

    path: str
    read: Callable[[Any, "Task"], Iterator[Mapping[str, Any]]]  # yields the rows of a file
    files: tuple[Any, ...]
    contents: tuple[str, ...]  # a text per file that changes with its content
    encoding: str
    header: tuple[str, ...] | None  # column names for CSV files without a header line
    images: tuple[str, ...]  # image columns; a file has at least one of them
    columns: tuple[str, ...]  # all other columns to read
    version: int = _VERSION

    @property
    def names(self) -> list[str]:
        """The columns of the table."""
        return list(dict.fromkeys([*self.images, *self.columns, "id"]))


def _open_text(kind: str, config: SourceConfig, seed: int) -> Table:
    """Open CSV or JSON files as a table; raises the errors of `open_records`."""
    files: Sequence[str] = files_of(config, kind)
    if is_remote(files[0]):
        files = [opened.full_name for opened in fsspec.open_files(files[0])]
    records = csv_records if kind == "csv" else json_records
    return open_records(config, records, files, [_content(file) for file in files])


def _annotation_columns(config: SourceConfig) -> SourceConfig:
    """Name the columns of KoCLIP's and COCO's annotation files; without exactly one caption language, use Korean."""
    language = next(iter(config.captions)) if len(config.captions) == 1 else "ko"
    return dataclasses.replace(config, image="file_path", captions={language: "captions"}, languages=None)


FORMATS = {
    "csv": Format(partial(_open_text, "csv"), (".csv", ".tsv"), encoded=True),
    "json": Format(partial(_open_text, "json"), (".json", ".jsonl"), encoded=True),
    "annotations": Format(partial(_open_text, "json"), encoded=True, columns=_annotation_columns),
}


def open_records(
    config: SourceConfig,
    read: Callable[[Any, Task], Iterator[Mapping[str, Any]]],
    files: Sequence[Any],
    contents: Sequence[str],
) -> Table:
    """Return the rows of files as a table with the columns that a source names, and `id`.

    `read` yields the rows of an item of `files`. `contents` are texts that change with the content of these items.

    Raises:
        SourceError: a column is in no row.
        FileError: a file is broken, or has another encoding or layout.
    """
    # `datasets` allows no split with the name `all`.
    wanted = re.sub(r"^all(?=\[|$)", "train", config.split)
    split = wanted.split("[")[0]
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
        if split != wanted:
            raise FileError(
                f"split: got {config.split!r}, expected one without brackets, because a stream cannot be cut; "
                "or set streaming: false"
            )
        for _ in _checked(itertools.islice(_records(files, task), _PEEKED), task):
            pass
        options = {"gen_kwargs": {"files": list(files), "task": task}, "split": datasets.NamedSplit(split)}
        return datasets.IterableDataset.from_generator(_rows, **options)
    table = select_split(datasets.Dataset.from_file(str(_cached(task))), wanted)
    return table.with_transform(_decoded)


def select_split(table: datasets.Dataset, split: str) -> datasets.Dataset:
    """Return the rows of a table that a slice such as `train[:10]` selects; all rows if there is no slice."""
    name = split.split("[")[0]
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table)})  # refuses `train+test`
    places = itertools.chain.from_iterable(range(part.from_, part.to) for part in parts)
    return table if split == name else table.select(places)


def _content(file: str) -> str:
    """Return a text that changes with a file's content."""
    if not is_remote(file):
        return str(stamp(file))
    filesystem, path = fsspec.core.url_to_fs(file)
    return str(filesystem.ukey(path))


def _rows(files: Sequence[Any], task: Task) -> Iterator[dict[str, Any]]:
    """Yield the wanted cells of every row."""
    for record in _records(files, task):
        yield {name: dig(record, name) for name in task.names}


def _cached(task: Task) -> Path:
    """Return an Arrow file of the rows, written if it is missing. Each cell is JSON: a column may hold mixed types."""
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
    """Yield the records; at their end, check that each column was in at least one of them."""
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
    """Yield the lines of a CSV or TSV file by column. In TSV, quotes are text: an open one would swallow lines."""
    tabs = suffix_of(file) == ".tsv"
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}
    lines = csv.reader(read_lines(read_text(file, task.encoding)), strict=True, **form)  # type: ignore[arg-type]
    header: Sequence[str] | None = task.header
    line = 1
    while True:
        try:
            fields = next(lines, None)
        except csv.Error as error:
            advice = "write a quote inside a quoted field twice; in a .tsv file, quotes are text"
            raise FileError(f"{file}, line {line}: {error}; {advice}") from error
        if fields is None:
            break
        if header is None:
            header = fields
            repeated = {name for name in fields if fields.count(name) > 1} & set(task.columns)
            if repeated:
                raise FileError(f"{file} has the column {min(repeated)!r} twice; give each column a different name")
        elif "".join(fields).strip() or len(fields) == len(header) > 1:  # not a blank line
            if len(fields) != len(header):
                advice = "put quotes around a field with the separator or a line break"
                raise FileError(f"{file}, line {line}: {len(fields)} fields, expected {len(header)}; {advice}")
            yield dict(zip(header, fields, strict=True))
        line = lines.line_num + 1
    if header is None:
        raise FileError(f"{file} is empty")


def json_records(file: str, task: Task) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a JSON array, or of a file with one object per line."""
    numbered = enumerate(read_lines(read_text(file, task.encoding)), 1)
    lines = ((number, line) for number, line in numbered if line.strip())
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
        raise _other_layout(_layout(document, task) or ("single", ""), file, task) from error
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
    """Return an object; a text becomes an object with the column `text`."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        raise FileError(f"{place}: got {json.dumps(item, ensure_ascii=False)[:60]}, expected an object")
    return item


def _layout(data: Mapping[str, Any], task: Task) -> tuple[str, str] | None:
    """Return the layout of a document that is not a row, by its name in assets/json_layouts.yaml, and its rows' key."""

    def has_columns(record: Mapping[str, Any]) -> bool:
        image = not task.images or any(has_column(record, image) for image in task.images)
        return image and all(has_column(record, column) for column in task.columns)

    cells = [dig(data, image) for image in task.images if has_column(data, image)]
    images, annotations = _objects(data.get("images")), _objects(data.get("annotations"))
    if images and "sentences" in images[0]:
        return "karpathy", ""
    if images and annotations and annotations[0].keys() >= {"image_id", "caption"}:
        return "coco", ""
    if any(isinstance(cell, list) for cell in cells) and all(isinstance(value, list) for value in data.values()):
        return "lists", ""
    if any(isinstance(cell, Mapping) for cell in cells) and all(isinstance(value, Mapping) for value in data.values()):
        return "objects", ""
    if has_columns(data):
        return None
    for key, value in data.items():
        if (records := _objects(value)) and has_columns(records[0]):
            return "records", key
    texts = (isinstance(value, str) or _is_list(value, str) for value in data.values())
    return ("by_name", "") if all(texts) else None


def _other_layout(layout: tuple[str, str], file: str, task: Task) -> FileError:
    """Return the error for files with another layout: the settings that read it, or Python that converts them."""
    name, key = layout
    layouts = yaml.safe_load(resources.files("koclip").joinpath("assets/json_layouts.yaml").read_text(encoding="utf-8"))
    what = layouts[name]["what"].replace("KEY", repr(key))
    if settings := layouts[name].get("settings"):
        return FileError(f"{file} is {what}; set {settings}")
    rows = layouts[name]["rows"].replace("KEY", repr(key))
    first, several = Path(task.files[0]), len(task.files) > 1
    code = layouts["script"].format(
        rows=textwrap.indent(rows, "    "),
        output=str(first.parent / "rows.jsonl" if several else first.with_suffix(".jsonl")),
        paths=f"sorted(glob.glob({task.path!r}, recursive=True))" if several else [task.files[0]],
        encoding="utf-8-sig" if task.encoding == "utf-8" else task.encoding,
    )
    return FileError(
        f"{file} is {what}; expected JSON Lines or an array of objects, which these lines of Python write:\n{code}"
    )


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of objects; an empty list for any other value."""
    return value if _is_list(value, Mapping) else []


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
