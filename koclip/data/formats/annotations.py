"""Read annotation files with folders of pictures: COCO, Karpathy, Flickr8k and Flickr30k, one JSON file per picture.

A row has the columns `image` and `captions`, and the other fields of its record, such as `license`. A picture without
captions, and captions of a picture that the file does not list, are rows too, so that they are listed as skipped.
A file of COCO or Karpathy is read whole, once; its rows are cached.
"""

import dataclasses
import fnmatch
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from koclip.config import SourceConfig, locate
from koclip.data.formats import Format, Table, dig
from koclip.data.formats.files import (
    PICTURES,
    FileError,
    SourceError,
    files_of,
    is_folder,
    picture_path,
    read_lines,
    read_text,
    stamp,
    walk,
)
from koclip.data.formats.text_files import Task, csv_records, open_records

_PEEKED = 100  # rows whose pictures are looked for when a source is opened
_NAMED = 5  # most files that an error names
_KINDS = {"a text": str, "a number": int, "a list": list}
# Names of the columns of captions.txt, of Flickr8k and of Flickr30k.
_IMAGE, _CAPTION = ("image", "image_name"), ("caption", "comment")
_LIST = re.compile(r".*(train|dev|test)Images\.txt")  # names of pictures, next to Flickr8k.token.txt
_DEV = ("val", "validation")  # other names of the split `dev`

Record = Mapping[str, Any]


def _columns(kind: str, config: SourceConfig) -> SourceConfig:
    """Name the columns of annotation files. They do not say the language of their captions."""
    if len(config.captions) != 1:
        raise SourceError(
            f"data.sources[].captions: got {config.captions} for {config.path!r}, expected the language of the {kind} "
            "captions: {en: captions} or {ko: captions}"
        )
    image = None if config.image is None else "image"
    return dataclasses.replace(config, image=image, captions=dict.fromkeys(config.captions, "captions"), languages=None)


def _open(read: Callable[[Any, Task], Iterator[Record]], config: SourceConfig, seed: int) -> Table:
    """Open annotation files in JSON; `read` yields the rows of a file and a split."""
    files: Sequence[str] = files_of(config, "json")
    parts = [(file, config.split.split("[")[0]) for file in files]
    return _with_pictures(config, open_records(config, read, parts, [str(stamp(file)) for file in files]))


def _with_pictures(config: SourceConfig, table: Table) -> Table:
    """Return the table.

    Raises:
        SourceError: none of the pictures of its first rows exists.
    """
    heads = islice(table, _PEEKED) if config.image is not None else ()
    names = [name for record in heads for column in config.images if isinstance(name := dig(record, column), str)]
    paths = [picture_path(config, name) for name in names]
    if paths and not any(path.exists() for path in paths):
        raise SourceError(
            f"data.sources[].image_root: got {config.image_root!r} for {config.path!r}, but none of the first "
            f"{len(paths)} pictures exists, such as {paths[0]}; set image_root to the folder where these names start"
        )
    return table


def _parsed(file: str, encoding: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the content of a JSON file; `hook` replaces each object."""
    try:
        return json.loads("".join(read_text(file, encoding)), object_hook=hook)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{file} is not JSON: {error}; copy or download it again") from error


def _without_tokens(item: dict[str, Any]) -> dict[str, Any]:
    """Remove the words of a sentence: they would take two thirds of the memory that Karpathy's file needs."""
    item.pop("tokens", None)
    return item


def _listed(document: Any, key: str, file: str) -> list[Any]:
    """Return the list in a key of a document."""
    value = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(value, list):
        keys = f"an object with the keys {sorted(document)[:20]}" if isinstance(document, Mapping) else "no object"
        raise FileError(f"{file}: got {keys}, expected a list in {key!r}")
    return value


def _field(record: Any, key: str, kind: str, place: str) -> Any:
    """Return the field of a record; `kind` is a key of `_KINDS`.

    Raises:
        FileError: the record has no such field.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, _KINDS[kind]):
        raise FileError(f"{place}: got {json.dumps(record, ensure_ascii=False)[:200]}, expected {kind} in {key!r}")
    return value


def coco_records(part: tuple[str, str], task: Task) -> Iterator[Record]:
    """Yield the images of COCO's captions_*.json with their captions, then captions of images that it does not list."""
    file, _ = part
    document = _parsed(file, task.encoding)
    images: dict[int, Record] = {}
    for number, image in enumerate(_listed(document, "images", file)):
        place = f"{file}, images[{number}]"
        name = _field(image, "file_name", "a text", place)
        known = images.setdefault(_field(image, "id", "a number", place), image)["file_name"]
        if name != known:
            raise FileError(f"{place}: {known} and {name} have the same id {image['id']}; give each image its own id")
    captions: dict[int, list[str]] = {identity: [] for identity in images}
    orphans = []
    for number, annotation in enumerate(_listed(document, "annotations", file)):
        place = f"{file}, annotations[{number}]"  # instances_*.json and person_keypoints_*.json have no captions
        text = _field(annotation, "caption", "a text", place)
        identity = _field(annotation, "image_id", "a number", place)
        if identity in captions:
            captions[identity].append(text)
        else:
            name = f"annotation {annotation.get('id')} of image {identity}, which is not listed"
            orphans.append({"image": None, "captions": [text], "id": name})
    for identity, image in images.items():
        yield {**image, "image": image["file_name"], "captions": captions[identity]}
    yield from orphans


def karpathy_records(part: tuple[str, str], task: Task) -> Iterator[Record]:
    """Yield the images of a split of Karpathy's dataset_*.json: `train`, `restval`, `val`, `test`, or `all`."""
    file, wanted = part
    splits: dict[str, str] = {}
    rows = []
    for number, image in enumerate(_listed(_parsed(file, task.encoding, _without_tokens), "images", file)):
        place = f"{file}, images[{number}]"
        split, name = _field(image, "split", "a text", place), _field(image, "filename", "a text", place)
        name = "/".join(filter(None, [image.get("filepath"), name]))
        if splits.setdefault(name, split) != split:
            raise FileError(f"{place}: {name} is in the splits {splits[name]} and {split}; keep it in one of them")
        captions = [_field(item, "raw", "a text", place) for item in _field(image, "sentences", "a list", place)]
        if wanted in (split, "all"):
            rows.append({**image, "image": name, "captions": captions})
    if not rows:
        raise SourceError(
            f"source {task.path!r} has no split {wanted!r}; it has {sorted(set(splits.values()))}, and all. For "
            "several, set split: all and where: {split: [...]}"
        )
    yield from rows


def _open_flickr(config: SourceConfig, seed: int) -> Table:
    """Open the caption files of Flickr8k and Flickr30k, with the lists of names next to them."""
    files: Sequence[str] = files_of(config, "flickr")
    wanted = config.split.split("[")[0]
    lists = [_lists(Path(file).parent) for file in files]
    if wanted not in ("train", "all") and not all(wanted in own for own in lists):
        raise SourceError(
            f"source {config.path!r} has no split {wanted!r}: expected a list of the names next to it, such as "
            f"Flickr_8k.{wanted}Images.txt; or Karpathy's dataset_flickr8k.json or dataset_flickr30k.json"
        )
    parts = [(file, own.get(wanted, "")) for file, own in zip(files, lists, strict=True)]
    contents = [str([stamp(file) for file in part if file]) for part in parts]
    return _with_pictures(config, open_records(config, flickr_records, parts, contents))


def _lists(folder: Path) -> dict[str, str]:
    """Return the files with the names of the pictures of each split."""
    lists = {match[1]: str(file) for file in folder.iterdir() if (match := _LIST.fullmatch(file.name))}
    return lists | {name: lists["dev"] for name in _DEV if "dev" in lists}


def flickr_records(part: tuple[str, str], task: Task) -> Iterator[Record]:
    r"""Yield the images of a caption file, of those named in a list ("": all).

    Its lines are `<image>#<number>\t<caption>`; or CSV with a header line, as in captions.txt.
    """
    file, names = part
    captions: dict[str, list[str]] = {}
    if names:
        listed = (line.strip() for line in read_lines(read_text(names, task.encoding)))
        captions = {_nfc(name): [] for name in listed if name}
    for image, caption in _caption_lines(file, task):
        name = _nfc(image)
        if not names or name in captions:
            captions.setdefault(name, []).append(caption)
    yield from ({"image": image, "captions": own} for image, own in captions.items())


def _caption_lines(file: str, task: Task) -> Iterator[tuple[str, str]]:
    """Yield each caption with the name of its image."""
    first = next(iter(read_lines(read_text(file, task.encoding))), "")
    if "\t" not in first:
        for record in csv_records(file, task._replace(header=None)):
            image, caption = (
                next((record[name] for name in own if name in record), None) for own in (_IMAGE, _CAPTION)
            )
            if image is None or caption is None:
                expected = "lines of <image>#<number>, a tab and a caption, or CSV with the columns image and caption"
                raise FileError(f"{file}, line 1: got {first.strip()[:200]!r}, expected {expected}")
            yield image, caption
        return
    for number, line in enumerate(read_lines(read_text(file, task.encoding)), 1):
        name, tab, caption = line.rstrip("\r\n").partition("\t")
        image, _, place = name.rpartition("#")
        if line.strip() and not (tab and image and place.isdigit()):
            raise FileError(
                f"{file}, line {number}: got {line[:200]!r}, expected <image>#<number>, a tab and a caption"
            )
        if line.strip():
            yield image, caption


class _Labels(NamedTuple):
    """JSON files, and the paths of the pictures by their names in NFC, with and without suffix."""

    files: tuple[str, ...]
    pictures: Mapping[str, Sequence[str]]


def _open_json_per_image(config: SourceConfig, seed: int) -> Table:
    """Open JSON files that describe an image each. The images are below `image_root`, or below the folder of `path`."""
    files: Sequence[str] = files_of(config, "json")
    path = Path(config.path)
    folder = locate(config.image_root or (path if is_folder(locate(path)) else path.parent))
    if not is_folder(folder):
        raise SourceError(
            f"data.sources[].image_root: got {config.image_root!r} for {config.path!r}, but {folder} is not a folder; "
            "set image_root to the folder of the pictures"
        )
    labels = _Labels(tuple(files), _pictures_by_name(folder))
    contents = xxh3_64_hexdigest(repr([stamp(file) for file in files]).encode())
    return _with_pictures(config, open_records(config, json_per_image_records, [labels], [contents]))


def _pictures_by_name(folder: Path) -> dict[str, list[str]]:
    pictures: dict[str, list[str]] = {}
    for path in walk(folder):
        if path.suffix.lower() in PICTURES:
            for name in (path.name, path.stem):
                pictures.setdefault(_nfc(name), []).append(str(path.absolute()))
    return pictures


def json_per_image_records(labels: _Labels, task: Task) -> Iterator[Record]:
    """Yield the object in each JSON file, with the path of its image in the image column.

    A column of captions with `*`, such as `context.caption_ko_*`, is the list of the fields that match.

    Raises:
        FileError: files are not JSON objects, or several images have a name.
    """
    broken = []
    for file in labels.files:
        try:
            record = _parsed(file, task.encoding)
            if not isinstance(record, Mapping):
                raise FileError(f"{file}: got {json.dumps(record, ensure_ascii=False)[:60]}, expected an object")
        except FileError as error:
            broken.append(str(error))
            continue
        lists = {column: texts for column in task.columns if "*" in column and (texts := _matching(record, column))}
        yield {**record, **lists, **{column: _picture(record, column, file, labels) for column in task.images}}
    if broken:
        first = "\n".join(broken[:_NAMED])
        raise FileError(f"{len(broken)} of {len(labels.files)} files cannot be read; repair or remove them:\n{first}")


def _matching(record: Record, column: str) -> list[Any]:
    """Return the values of the fields that match the last part of a dotted name, in the order of their names."""
    place, _, pattern = column.rpartition(".")
    fields = dig(record, place) if place else record
    names = fnmatch.filter(fields, pattern) if isinstance(fields, Mapping) else []
    return [fields[name] for name in sorted(names, key=lambda name: (len(name), name))]


def _picture(record: Record, column: str, file: str, labels: _Labels) -> str:
    """Return the path of the image that a record names; by default the image has the same name as the file."""
    value = dig(record, column)
    name = Path(value).name if isinstance(value, str) and value else Path(file).stem
    paths = labels.pictures.get(_nfc(name), [])
    if len(paths) > 1:
        raise FileError(
            f"{file}: several pictures have the name {name!r}: {paths[:_NAMED]}; set image_root to one folder"
        )
    return paths[0] if paths else name


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


FORMATS = {
    "coco": Format(partial(_open, coco_records), encoded=True, columns=partial(_columns, "coco")),
    "karpathy": Format(partial(_open, karpathy_records), encoded=True, columns=partial(_columns, "karpathy")),
    "flickr": Format(_open_flickr, (".token",), encoded=True, columns=partial(_columns, "flickr")),
    "json_per_image": Format(_open_json_per_image, encoded=True),
}
