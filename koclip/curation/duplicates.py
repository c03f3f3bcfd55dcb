"""Near-duplicates: perceptual hashes of pictures, candidates by bands of the hashes, and which row of a group stays.

The hash has a bit for each of the 8 x 8 lowest frequencies of the discrete cosine transform of a gray thumbnail:
whether its coefficient is positive (after Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions").
A mirrored picture changes the sign of the odd frequencies. The hash of a part of the picture is a product of other
matrices with the same thumbnail. So a picture is compared with other pictures, mirrored pictures and cropped pictures.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from koclip.config.curation import CurateConfig
from koclip.curation.batch import KEY, Batch, captions_at, drop, kept_places
from koclip.curation.captions import text_hash
from koclip.curation.pictures import PICTURE, PIXELS, SIDE, THUMBNAIL

HASHES = "hashes"  # column: the hashes of a picture as bytes; the first is the hash of the whole picture
SMALL = "small"  # column: a small thumbnail, (16, 16) uint8, as bytes
_SMALL_SIDE = 16
_MIN_CORRELATION = 0.9  # of the coefficients of near-duplicates
_BLOCK = 4_096  # candidates that are compared at a time
NEAR, REPEATED_PAIR = "near-duplicate", "repeated pair"
_FREQUENCIES = 8
_PARTS = (0.95, 0.9)  # sides of the parts, as shares of the picture's sides
_PLACES = 3  # of a part, along each side
_BANDS, _BITS = 8, 8
_SMALL = 200_000  # pictures, up to which two bands together are enough to find candidates

Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]


def cosines(side: int = SIDE) -> Floats:
    """Return the matrix (8, side) of the discrete cosine transform (DCT-II), lowest frequencies first, not scaled."""
    angles = np.outer(np.arange(_FREQUENCIES), np.arange(side) + 0.5) * np.pi / side
    return np.cos(angles)


def _part(start: float, size: float, side: int) -> Floats:
    """Return the transform (8, side) of a part of a side, from `start`, both as shares; linear interpolation."""
    places = (start + (np.arange(side) + 0.5) / side * size) * side - 0.5
    left = np.floor(places).astype(np.int64).clip(0, side - 2)
    weights = (places - left).clip(0, 1)
    resample = np.zeros((side, side))
    resample[np.arange(side), left] = 1 - weights
    resample[np.arange(side), left + 1] += weights
    return cosines(side) @ resample


def coefficients(thumbnails: npt.NDArray[Any], crops: bool) -> Floats:
    """Return the coefficients (N, V, 8, 8) of the views of thumbnails (N, S, S).

    The views are the whole picture, with `crops` its parts, then all mirrored. Without `crops`, V is 2; with them, 38.
    """
    sides = [[(0.0, 1.0)]]
    if crops:
        sides += [[(start, size) for start in np.linspace(0, 1 - size, _PLACES).tolist()] for size in _PARTS]
    hashes = []
    for group in sides:
        transforms = np.concatenate([_part(*part, side=thumbnails.shape[1]) for part in group])
        products = transforms @ thumbnails.astype(np.float64) @ transforms.T  # (N, 8 * parts, 8 * parts)
        count = len(group)
        blocks = products.reshape(-1, count, _FREQUENCIES, count, _FREQUENCIES).swapaxes(2, 3)
        hashes.append(blocks.reshape(len(thumbnails), count * count, _FREQUENCIES, _FREQUENCIES))
    upright = np.concatenate(hashes, 1)
    mirrored = upright * np.where(np.arange(_FREQUENCIES) % 2, -1, 1)
    return np.concatenate([upright, mirrored], 1)


def picture_hashes(thumbnails: npt.NDArray[np.float32], crops: bool) -> Hashes:
    """Return the hashes (N, V) of the views of thumbnails (N, SIDE, SIDE): see `coefficients`."""
    values = coefficients(thumbnails, crops)
    bits = values.reshape(*values.shape[:2], -1) > 0
    bits[..., 0] = False  # the mean brightness, always positive
    packed = np.packbits(bits, axis=-1)
    return packed.view(np.uint64)[..., 0]


def add_hashes(batch: Batch, config: CurateConfig) -> Batch:
    """Add the hashes and small thumbnails of the kept rows' pictures."""
    column = [b""] * len(batch[KEY])
    small_column = list(column)
    places = kept_places(batch) if config.duplicates.enabled or config.overlap.sources else []
    if places:
        thumbnails = np.stack([batch[THUMBNAIL][place] for place in places])
        hashes = picture_hashes(thumbnails, config.duplicates.crops)
        step = SIDE // _SMALL_SIDE
        small = thumbnails.reshape(-1, _SMALL_SIDE, step, _SMALL_SIDE, step).mean((2, 4)).round().astype(np.uint8)
        for place, own, thumbnail in zip(places, hashes, small, strict=True):
            column[place], small_column[place] = own.tobytes(), thumbnail.tobytes()
    return batch | {HASHES: column, SMALL: small_column}


class Pictures(NamedTuple):
    """The facts of some rows, for `decide_duplicates`."""

    keys: list[str]
    pictures: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    captions: npt.NDArray[np.uint64]
    hashes: Hashes  # (N, V)
    small: npt.NDArray[np.uint8]  # (N, 16, 16)


def collect_pictures(batch: Batch, config: CurateConfig) -> Pictures:
    """Return the facts of the kept rows that have hashes."""
    places = [place for place in kept_places(batch) if batch[HASHES][place]]
    hashes = np.frombuffer(b"".join(batch[HASHES][place] for place in places), np.uint64)
    return Pictures(
        [batch[KEY][place] for place in places],
        np.array([batch[PICTURE][place] for place in places], np.int64),
        np.array([batch[PIXELS][place] for place in places], np.int64),
        np.array([text_hash(repr(list(captions_at(batch, place)))) for place in places], np.uint64),
        hashes.reshape(len(places), -1) if places else np.empty((0, 0), np.uint64),
        np.frombuffer(b"".join(batch[SMALL][place] for place in places), np.uint8).reshape(-1, *(_SMALL_SIDE,) * 2),
    )


Decision = dict[str, tuple[str, str]]


def decide_duplicates(facts: Iterable[Pictures], config: CurateConfig) -> Decision:
    """Return the dropped rows by key, each with its reason and the key of the row that stays.

    Rows with the same stored picture and other captions stay together. Of a group of near-duplicates, the picture with
    the most pixels stays, then the one with the smallest hash: the order of the rows does not matter.
    """
    parts = [part for part in facts if part.keys] if config.duplicates.enabled else []
    if not parts:
        return {}
    keys = list(itertools.chain.from_iterable(part.keys for part in parts))
    pictures, first, node = np.unique(
        np.concatenate([part.pictures for part in parts]), return_index=True, return_inverse=True
    )
    pixels = np.concatenate([part.pixels for part in parts])[first]
    hashes = np.concatenate([part.hashes for part in parts])[first]
    pairs = similar(hashes, config.duplicates.max_distance)
    pairs = pairs[alike(np.concatenate([part.small for part in parts])[first], pairs, config.duplicates.crops)]
    links = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(pictures),) * 2)
    groups = connected_components(links, directed=False)[1]
    order = np.lexsort((pictures, -pixels, groups))
    best = order[np.unique(groups[order], return_index=True)[1]][groups]  # of each picture's group
    decision: Decision = {}
    pairs_seen: dict[tuple[int, int], str] = {}
    captions = np.concatenate([part.captions for part in parts])
    for key, number, caption in zip(keys, node.tolist(), captions.tolist(), strict=True):
        if best[number] != number:
            decision[key] = (NEAR, keys[first[best[number]]])
        elif (number, caption) in pairs_seen:
            decision[key] = (REPEATED_PAIR, pairs_seen[number, caption])
        else:
            pairs_seen[number, caption] = key
    return decision


def drop_duplicates(batch: Batch, decision: Decision, config: CurateConfig) -> Batch:
    """Drop the rows of the decision."""
    places = {place: decision[key] for place, key in enumerate(batch[KEY]) if key in decision}
    return drop(batch, places)


def similar(hashes: Hashes, max_distance: int) -> npt.NDArray[np.int64]:
    """Return pictures i, j and views v (P, 3): hash v of i and the first of j differ in at most `max_distance` bits.

    Hashes are cut into 8 bands of 8 bits. Candidates agree in two bands (of many pictures, in three). Every pair of at
    most 6 (5) different bits is a candidate, and most pairs of 7 and 8.
    """
    bands = 2 if len(hashes) <= _SMALL else 3
    pairs = [np.empty((0, 3), np.int64)]
    for chosen in itertools.combinations(range(_BANDS), bands):
        mask = np.uint64(sum(((1 << _BITS) - 1) << _BITS * band for band in chosen))
        masked = hashes[:, 0] & mask
        order = np.argsort(masked, kind="stable")
        for view in range(hashes.shape[1]):
            for left, right in _matches(masked[order], hashes[:, view] & mask):
                right = order[right]
                near = np.bitwise_count(hashes[left, view] ^ hashes[right, 0]) <= max_distance
                near &= left != right
                pairs.append(np.stack([left[near], right[near], np.full(near.sum(), view)], 1))
    return np.unique(np.concatenate(pairs), axis=0)


def alike(small: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int64], crops: bool) -> npt.NDArray[np.bool_]:
    """Return whether the coefficients of view v of i and of j are correlated, for pairs (P, 3) of `similar`.

    Signs alone agree by chance in a large set; coefficients do not.
    """
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _BLOCK):
        left, right, view = pairs[start : start + _BLOCK].T
        first = coefficients(small[left], crops)[np.arange(len(left)), view].reshape(len(left), -1)[:, 1:]
        second = coefficients(small[right], False)[:, 0].reshape(len(left), -1)[:, 1:]
        products = (first * second).sum(1)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        alike[start : start + _BLOCK] = products >= _MIN_CORRELATION * norms
    return alike


def _matches(
    sorted_keys: Hashes, probes: Hashes, most: int = 4_000_000
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield (places in `probes`, places in `sorted_keys`) of equal keys, about `most` at a time."""
    starts = np.searchsorted(sorted_keys, probes, "left")
    counts = np.searchsorted(sorted_keys, probes, "right") - starts
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(probes):
        before = ends[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + most, "right")))
        block = counts[begin:stop]
        left = np.repeat(np.arange(begin, stop), block)
        offsets = np.arange(len(left)) - np.repeat(np.cumsum(block) - block, block)
        yield left, np.repeat(starts[begin:stop], block) + offsets
        begin = stop
