"""Overlap with evaluation sets: rows whose picture, or caption if asked, is also in a named evaluation set.

A model that was trained on pictures of an evaluation set gets numbers that are too good. Pictures are compared as
near-duplicates are (`koclip.curation.duplicates`): by perceptual hashes, then by the correlation of their coefficients.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from koclip.config import CurateConfig, SourceConfig
from koclip.curation.batch import KEY, REASON, Batch, batch_of, captions_at, drop, kept_places
from koclip.curation.captions import text_hash
from koclip.curation.duplicates import Looks, Pictures, add_hashes, collect_pictures, first_places, similar_pictures
from koclip.curation.pictures import filter_pictures
from koclip.data.sources import open_source
from koclip.text.normalize import normalize

IN_SET = "in evaluation set"
_ROWS = 256  # of an evaluation set, in memory at a time
_NO_PICTURES = Pictures(
    [],
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, np.uint64),
    np.empty((0, 0), np.uint64),
    np.empty((0, 16, 16), np.uint8),
    np.empty((0, 0), np.float32),
)


class Facts(NamedTuple):
    """The facts of some rows: those of their pictures, and the hashes of their captions with the rows' keys."""

    pictures: Pictures
    captions: list[tuple[str, int]]


class Overlap(NamedTuple):
    """The decision: dropped rows by key, with the detail; the numbers for the report, by evaluation set."""

    dropped: dict[str, str]
    numbers: dict[str, Any]


def caption_hash(caption: str) -> int:
    """Return a hash of a caption that is equal for captions that differ in Unicode form, letter case or spaces."""
    return text_hash(normalize(normalize(caption).casefold()))


def collect_overlap(batch: Batch, config: CurateConfig) -> Facts:
    """Return the facts of the kept rows."""
    captions = []
    if config.overlap.captions:
        places = ((place, caption) for place in kept_places(batch) for _, _, caption in captions_at(batch, place))
        captions = [(batch[KEY][place], caption_hash(caption)) for place, caption in places]
    return Facts(collect_pictures(batch, config), captions)


def decide_overlap(facts: Iterable[Facts], config: CurateConfig) -> Overlap:
    """Return the rows that are in an evaluation set. The detail names what is equal, and the row of the set."""
    parts = list(facts)
    rows = _joined([part.pictures for part in parts])
    pictures = distinct(rows)
    captions = [pair for part in parts for pair in part.captions]
    dropped: dict[str, str] = {}
    numbers = {}
    for source in config.overlap.sources:
        known, hashes, left_out = read_set(source, config)
        own = {key: f"caption of {hashes[number]}" for key, number in captions if number in hashes}
        pairs = near_pairs(pictures, known, config)[::-1]  # of several pictures of the set, name the first
        twins = {int(pictures.pictures[place]): known.keys[other] for place, other in pairs.tolist()}
        identified = zip(rows.keys, rows.pictures.tolist(), strict=True)
        own |= {key: f"picture of {twins[picture]}" for key, picture in identified if picture in twins}
        dropped = own | dropped
        numbers[source.key] = {"pictures": len(known.keys), "left_out": left_out, "rows": len(own)}
    return Overlap(dropped, numbers)


def drop_overlap(batch: Batch, decision: Overlap, config: CurateConfig) -> Batch:
    """Drop the rows of the decision."""
    details = {place: decision.dropped.get(batch[KEY][place]) for place in kept_places(batch)}
    return drop(batch, {place: (IN_SET, detail) for place, detail in details.items() if detail})


def read_set(source: SourceConfig, config: CurateConfig) -> tuple[Pictures, dict[int, str], dict[str, int]]:
    """Return the pictures of an evaluation set, its captions, and the number of rows without a picture, by reason.

    Captions are the keys of their rows by the hash of the caption; empty unless `overlap.captions`. Small and long
    pictures are compared, too; almost uniform pictures cannot be.
    """
    config = replace(config, pictures=replace(config.pictures, min_side=1, max_ratio=float("inf")))
    parts: list[Pictures] = []
    captions: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    opened = open_source(source)
    remaining = opened.iter_rows()
    while rows := list(itertools.islice(remaining, _ROWS)):
        batch = batch_of(rows, list(source.captions)) | {REASON: [""] * len(rows)}  # rows without captions count, too
        if source.image is not None:
            checked = add_hashes(filter_pictures(batch, config), config)
            left_out.update(filter(None, checked[REASON]))
            parts.append(collect_pictures(checked, config))
        if config.overlap.captions:
            for place, key in enumerate(batch[KEY]):
                for _, _, caption in captions_at(batch, place):
                    captions.setdefault(caption_hash(caption), key)
    left_out.update("not a row" for _ in opened.left_out)
    return distinct(_joined(parts)), captions, dict(sorted(left_out.items()))


def distinct(rows: Pictures) -> Pictures:
    """Return the first row of each stored picture."""
    places, _ = first_places(rows.pictures)
    return Pictures._make([[rows.keys[place] for place in places], *(column[places] for column in rows[1:])])


def _joined(parts: Sequence[Pictures]) -> Pictures:
    filled = [part for part in parts if part.keys] or list(parts[:1]) or [_NO_PICTURES]
    keys = [key for part in filled for key in part.keys]
    return Pictures._make([keys, *map(np.concatenate, zip(*(part[1:] for part in filled), strict=True))])


def near_pairs(rows: Pictures, others: Pictures, config: CurateConfig) -> npt.NDArray[np.int64]:
    """Return the places (P, 2) of near-duplicate pictures in `rows` and in `others`, in ascending order."""
    if not rows.keys or not others.keys:
        return np.empty((0, 2), np.int64)
    looks, other_looks = (Looks(part.hashes, part.small) for part in (rows, others))
    pairs = similar_pictures(looks, other_looks, config)
    reverse = similar_pictures(other_looks, looks, config)[:, ::-1]
    return np.unique(np.concatenate([pairs, reverse]), axis=0)
