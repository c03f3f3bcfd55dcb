"""The page report.html: the numbers of report.json, and examples of each reason with small pictures on request."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import nsmallest
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from koclip import storage
from koclip.config.curation import CurateConfig
from koclip.curation.batch import DETAIL, KEY, LOST, NOTES, REASON, Batch, Rows, captions_at
from koclip.curation.captions import PERSONAL, text_hash, without_personal_data
from koclip.curation.duplicates import NEAR, REPEATED_PAIR
from koclip.curation.report import charts
from koclip.data.transforms import ImageError, decode
from koclip.evaluation.report.page import content as embedded
from koclip.evaluation.report.page import render
from koclip.licences import ALLOWS

FILE = "report.html"
NUM_EXAMPLES = 20  # of each reason
_PAIRED = {NEAR, REPEATED_PAIR}  # reasons whose detail is the key of the row that stays
_SHOWN, _LONGEST = 10, 300  # captions of a row, and characters of a caption, that are shown
_SIDE, _BLURRED_SIDE, _QUALITY = 160, 16, 80  # longer side of a thumbnail in pixels, and of what is left when blurred
_SIZES = ((2, 2), (3, 3), (4, 4), (5, 9), (10, 99), (100, None))  # of clusters, from and to


class Caption(NamedTuple):
    """A caption of an example; `reason` is why it was dropped, "" if it was not."""

    language: str
    text: str
    reason: str = ""


class Example(NamedTuple):
    """A row that was dropped, or (with `reason` "") has lost a caption. `order` is a hash of its key."""

    order: int
    key: str
    reason: str
    detail: str
    captions: list[Caption]
    more: int  # captions that are not shown


Examples = dict[str, list[Example]]  # by reason


def add_examples(examples: Examples, batch: Batch) -> None:
    """Keep the `NUM_EXAMPLES` rows of each reason whose keys have the smallest hashes, among them those of a batch."""
    places: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
    for place, (key, notes) in enumerate(zip(batch[KEY], batch[NOTES], strict=True)):
        reasons = {batch[REASON][place], *(note.split(": ", 1)[1] for note in notes)} - {"", *PERSONAL}
        if reasons:
            order = text_hash(key)
            for reason in reasons:
                places[reason].append((order, key, place))
    for reason, candidates in places.items():
        chosen = nsmallest(NUM_EXAMPLES, candidates)
        both = [*examples.get(reason, []), *(_example(batch, place) for _, _, place in chosen)]
        examples[reason] = nsmallest(NUM_EXAMPLES, both)


def _example(batch: Batch, place: int) -> Example:
    captions = [Caption(language, text) for language, _, text in captions_at(batch, place)]
    for note, text in zip(batch[NOTES][place], batch[LOST][place], strict=True):
        caption, reason = note.split(": ", 1)
        if reason not in PERSONAL:  # it was removed: do not show it
            captions.append(Caption(caption.partition("/")[0], without_personal_data(text)[0], reason))
    key = batch[KEY][place]
    shown = [caption._replace(text=_shortened(caption.text)) for caption in captions[-_SHOWN:]]
    return Example(text_hash(key), key, batch[REASON][place], batch[DETAIL][place], shown, len(captions) - len(shown))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def write(folder: Path, content: Mapping[str, Any], examples: Examples, rows: Rows, config: CurateConfig) -> None:
    """Write report.html. `content` is that of report.json; the pictures of the folder are in the page."""
    listed = [example for own in examples.values() for example in own]
    kept = _kept(listed, rows)
    thumbnails: dict[str, str] = {}
    if config.report.thumbnails != "none":
        keys = {example.key for example in [*listed, *kept.values()]}
        thumbnails = dict(_thumbnails(rows, keys, config.report.thumbnails, config.pictures.max_pixels))
    fields = _numbers(folder, content) | {"examples": examples, "kept": kept, "thumbnails": thumbnails}
    storage.replace_text(folder / FILE, render("curation.html", fields | {"shown": config.report.thumbnails}))


def write_numbers(folder: Path, content: Mapping[str, Any]) -> None:
    """Write report.html without examples, and without keys of rows: what may be published."""
    fields: dict[str, Any] = {"examples": {}, "kept": {}, "thumbnails": {}, "shown": "none"}
    storage.replace_text(folder / FILE, render("curation.html", _numbers(folder, content) | fields))


def _numbers(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the page that do not depend on the examples."""
    order = [*content["rows"]["dropped"], *content["captions"]["dropped"]]
    return {
        "content": content,
        "reasons": list(dict.fromkeys(order)),
        "paired": _PAIRED,
        "num_examples": NUM_EXAMPLES,
        "sizes": list(_size_table(content["clusters"]["sizes"])),
        "allows": list(ALLOWS.values()),
        "pictures": {
            name.partition(".")[0]: embedded(folder / name)
            for name in (charts.WATERFALL, charts.LENGTHS, charts.QUERIES)
            if (folder / name).is_file()
        },
        "version": content["koclip"],
    }


def _kept(examples: Iterable[Example], rows: Rows) -> dict[str, Example]:
    """Return by key the rows that stay for near-duplicates and repeated pairs."""
    keys = {example.detail for example in examples if example.reason in _PAIRED}
    kept: dict[str, Example] = {}
    for batch in rows.batches_with(keys) if keys else ():
        kept |= {key: _example(batch, place) for place, key in enumerate(batch[KEY]) if key in keys}
    return kept


def _size_table(sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield numbers of clusters by their size."""
    for start, stop in _SIZES:
        count = sum(count for size, count in sizes.items() if start <= int(size) <= (stop or int(size)))
        name = f"{start:,}" if stop == start else f"{start:,} to {stop:,}" if stop else f"{start:,} or more"
        if count:
            yield name, count


def _thumbnails(
    rows: Rows, keys: set[str], kind: Literal["blurred", "clear"], max_pixels: int
) -> Iterator[tuple[str, str]]:
    """Yield the key and the thumbnail of each of these rows whose picture can be decoded."""
    for row in rows.pictures(keys):
        try:
            pixels = decode(row.image, max_pixels, "pictures.max_pixels")
        except ImageError:  # the reason why the row was dropped
            continue
        yield row.key, thumbnail(pixels, kind)


def thumbnail(pixels: torch.Tensor, kind: Literal["blurred", "clear"]) -> str:
    """Return an image (3, H, W) uint8 as a small JPEG in base64.

    Of a blurred one, 16 pixels of the longer side are left before it is enlarged.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    size = _within(image.size, _SIDE)
    if kind == "blurred":
        image = image.resize(_within(image.size, _BLURRED_SIDE), Image.Resampling.BOX)
    buffer = BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return a size (width, height) whose longer side is at most `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))
