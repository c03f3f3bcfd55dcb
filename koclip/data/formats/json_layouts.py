"""Know JSON documents that are no rows, such as COCO's, and say which lines of Python make rows of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
_ONE = """\
    yield data"""
ONE = ("one JSON object, as in AI-Hub's JSON file per picture", _ONE)

Layout = tuple[str, str]  # what a document is, and the body of a generator of its rows


def layout_of(data: Mapping[str, Any], cells: Sequence[object], has_columns: Callable[[Any], bool]) -> Layout | None:
    """Return the layout of a document that is not a row, None if it is one.

    Args:
        data: The document.
        cells: What it holds in the columns of images.
        has_columns: Tells whether a record has the columns that a source names.
    """
    images, annotations = _records(data.get("images")), _records(data.get("annotations"))
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
        if (records := _records(value)) and has_columns(records[0]):
            return f"an object with its rows in {key!r}", _RECORDS.format(key=key)
    if all(isinstance(value, str) or _texts(value) for value in data.values()):
        return "captions by the name of the image", _BY_NAME
    return None


def conversion(layout: Layout, path: str, files: Sequence[str], encoding: str) -> str:
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


def _records(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of objects; nothing if it is something else."""
    return value if isinstance(value, list) and all(isinstance(item, Mapping) for item in value) else []


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
