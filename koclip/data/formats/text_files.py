"""Read tables from CSV, TSV and JSON files. Cells of CSV are text; those of JSON are what JSON says, unchanged.

`datasets` reads such files with pandas and Arrow, which make numbers, dates and missing values of what looks like one,
take the first column for an index where a line has one field more, and let some broken text pass.
"""

import csv
import dataclasses
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

_PEEKED = 1_000  # rows of a stream that its columns are read from
_BATCH = 10_000  # rows written at once
_VERSION = 2  # of the files that are kept
_JSON = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is a missing value
csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072
# Lines of Python that make JSON Lines of documents that are not rows, such as COCO's.
_CONVERT = """\
import glob, json
def rows(data):
{rows}
with open({output!r}, "w", encoding="utf-8") as lines:
    for path in {paths}:
        with open(path, encoding={encoding!r}) as file:
            for row in rows(json.load(file)):
                lines.write(json.dumps(row, ensure_ascii=False) + "\\n")"""
_COCO = """\
    captions = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        yield {"image": image["file_name"], "captions": captions[image["id"]]}"""
_KARPATHY = """\
    for image in data["images"]:
        name = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield {"image": name, "captions": captions, "split": image["split"]}"""
_BY_NAME = """\
    for name, captions in data.items():
        yield {"image": name, "captions": captions}"""
_LISTS = """\
    for cells in zip(*data.values()):
        yield dict(zip(data, cells))"""
_DICTS = """\
    for key in next(iter(data.values())):
        yield {name: cells[key] for name, cells in data.items()}"""
_RECORDS = """\
    yield from data[{key!r}]"""
_OBJECT = """\
    yield data"""
_SINGLE = ("one JSON object, as in AI-Hub's JSON file per picture", _OBJECT)

Layout = tuple[str, str]  # what a document is, and the body of a generator of its rows


class Task(NamedTuple):
    """What is read, and how. A hash of it names the file that the rows are kept in."""

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


def _open_csv(config: SourceConfig, seed: int) -> Table:
    return _open_text(config, "csv")


def _open_json(config: SourceConfig, seed: int) -> Table:
    return _open_text(config, "json")


def _open_text(config: SourceConfig, kind: str) -> Table:
    """Open files as a table of the columns that a source names, and `id`.

    Raises:
        SourceError: no row has one of the columns.
        FileError: a file is broken, not in its encoding or of another layout.
    """
    files: Sequence[str] = files_of(config, kind)
    if is_remote(files[0]):
        files = [opened.full_name for opened in fsspec.open_files(files[0])]
    records = csv_records if kind == "csv" else json_records
    return open_records(config, records, files, [_content(file) for file in files])


def _annotation_columns(config: SourceConfig) -> SourceConfig:
    """KoCLIP's and COCO's annotation files have fixed columns; they hold one language, Korean unless named."""
    language = next(iter(config.captions)) if len(config.captions) == 1 else "ko"
    return dataclasses.replace(config, image="file_path", captions={language: "captions"}, languages=None)


FORMATS = {
    "csv": Format(_open_csv, (".csv", ".tsv"), encoded=True),
    "json": Format(_open_json, (".json", ".jsonl"), encoded=True),
    "annotations": Format(_open_json, encoded=True, columns=_annotation_columns),
}


def open_records(
    config: SourceConfig,
    read: Callable[[Any, Task], Iterator[Mapping[str, Any]]],
    files: Sequence[Any],
    contents: Sequence[str],
) -> Table:
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
        return str(stamp(file))
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
        raise _other_layout(_layout(document, task) or _SINGLE, file, task) from error
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

    return _layout_of(document, images, has_columns)


def _other_layout(layout: Layout, file: str, task: Task) -> FileError:
    return FileError(f"{file} cannot be read as it is: {_conversion(layout, task.path, task.files, task.encoding)}")


def _layout_of(data: Mapping[str, Any], cells: Sequence[object], has_columns: Callable[[Any], bool]) -> Layout | None:
    """Return the layout of a document that is not a row, None if it is one.

    Args:
        data: The document.
        cells: What it holds in the columns of images.
        has_columns: Tells whether a record has the columns that a source names.
    """
    images, annotations = _objects(data.get("images")), _objects(data.get("annotations"))
    if images and "sentences" in images[0]:
        return "Karpathy's JSON: images with sentences", _KARPATHY
    if images and annotations and annotations[0].keys() >= {"image_id", "caption"}:
        return "COCO's JSON: images and annotations", _COCO
    if any(isinstance(cell, list) for cell in cells) and all(isinstance(value, list) for value in data.values()):
        return "one list per column", _LISTS
    if any(isinstance(cell, Mapping) for cell in cells) and all(isinstance(value, Mapping) for value in data.values()):
        return "one object per column, as pandas writes it", _DICTS
    if has_columns(data):
        return None
    for key, value in data.items():
        if (records := _objects(value)) and has_columns(records[0]):
            return f"an object with its rows in {key!r}", _RECORDS.format(key=key)
    if all(isinstance(value, str) or _texts(value) for value in data.values()):
        return "captions by the name of the image", _BY_NAME
    return None


def _conversion(layout: Layout, path: str, files: Sequence[str], encoding: str) -> str:
    """Say what files hold, and the lines that write their rows as JSON Lines.

    Args:
        layout: What they hold.
        path: Where a source's files are, a pattern if there are several.
        files: The files.
        encoding: Their encoding.
    """
    what, rows = layout
    several = len(files) > 1
    code = _CONVERT.format(
        rows=rows,
        output=str(Path(files[0]).parent / "rows.jsonl" if several else Path(files[0]).with_suffix(".jsonl")),
        paths=f"sorted(glob.glob({path!r}, recursive=True))" if several else [files[0]],
        encoding="utf-8-sig" if encoding == "utf-8" else encoding,
    )
    return f"it is {what}; koclip reads JSON Lines and arrays of objects, which these lines of Python write:\n{code}"


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of objects; nothing if it is something else."""
    return value if isinstance(value, list) and all(isinstance(item, Mapping) for item in value) else []


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
