"""Near-duplicates: perceptual hashes of pictures, candidates by bands of the hashes, and which row of a group stays.

The hash has a bit for each of the 8 x 8 lowest frequencies of the discrete cosine transform of a gray thumbnail:
whether its coefficient is positive (after Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions").
A mirrored picture changes the sign of the odd frequencies. The hash of a part of the picture is a product of other
matrices with the same thumbnail. So a picture is compared with other pictures, mirrored pictures and cropped pictures.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from koclip.config.curation import CurateConfig
from koclip.curation.batch import KEY, PATIENCE, Batch, captions_at, drop, kept_places
from koclip.curation.captions import text_hash
from koclip.curation.pictures import PICTURE, PIXELS, SIDE, THUMBNAIL
from koclip.curation.scores import EMBEDDING, close_embeddings

HASHES = "hashes"  # column: the hashes of a picture as bytes; the first is the hash of the whole picture
SMALL = "small"  # column: a small thumbnail, (16, 16) uint8, as bytes
_SMALL_SIDE = 16
_MIN_CORRELATION = 0.9  # of the coefficients of near-duplicates
_BLOCK = 4_096  # candidates that are compared at a time
NEAR, REPEATED_PAIR = "near-duplicate", "repeated pair"
_FREQUENCIES = 8
_PARTS = (0.95, 0.9)  # sides of the parts, as shares of the picture's sides
_PLACES = 3  # of a part, along each side
_MIRRORED = np.uint64(0x5555555555555555)  # the bits of the odd horizontal frequencies
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # spreads bits over the highest bits of a product (Knuth 1998, 6.4)
_MANY = 255  # the largest number of a byte
_LOOKED_UP, _CANDIDATES = 1 << 17, 1 << 20  # hashes at a time: they stay in the cache of the processor

Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


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

    The views are the whole picture and, with `crops`, its parts. Without `crops`, V is 1; with them, 19.
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
    return np.concatenate(hashes, 1)


def picture_hashes(thumbnails: npt.NDArray[np.float32], crops: bool) -> Hashes:
    """Return the hashes (N, V) of the views of thumbnails (N, SIDE, SIDE): see `coefficients`."""
    values = coefficients(thumbnails, crops)
    bits = values.reshape(*values.shape[:2], -1) > 0
    bits[..., 0] = False  # the mean brightness, always positive
    packed = np.packbits(bits, axis=-1)
    return packed.view(np.uint64)[..., 0]


def mirrored(hashes: Hashes) -> Hashes:
    """Return the hashes of the mirrored pictures: their odd horizontal frequencies have the opposite sign."""
    return hashes ^ _MIRRORED


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
    pictures: Integers
    pixels: Integers
    captions: npt.NDArray[np.uint64]
    hashes: Hashes  # (N, V)
    small: npt.NDArray[np.uint8]  # (N, 16, 16)
    embeddings: npt.NDArray[np.float32]  # (N, D); D is 0 if they are not compared


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
        _embeddings(batch, places, config),
    )


def _embeddings(batch: Batch, places: list[int], config: CurateConfig) -> npt.NDArray[np.float32]:
    if config.duplicates.min_cosine is None or EMBEDDING not in batch or not places:
        return np.empty((len(places), 0), np.float32)
    return np.frombuffer(b"".join(batch[EMBEDDING][place] for place in places), np.float32).reshape(len(places), -1)


Decision = dict[str, tuple[str, str]]


def decide_duplicates(facts: Iterable[Pictures], config: CurateConfig) -> Decision:
    """Return the dropped rows by key, each with its reason and the key of the row that stays.

    Rows with the same stored picture and other captions stay together. Of a group of near-duplicates, the picture with
    the most pixels stays, then the one with the smallest hash: the order of the rows does not matter.
    """
    lists: list[pa.StringArray] = []  # a third of the memory of Python's strings
    parts: list[tuple[Integers, Integers, Hashes]] = []
    looks = Looks(np.empty((0, 0), np.uint64), np.empty((0, _SMALL_SIDE, _SMALL_SIDE), np.uint8))
    embeddings = np.empty((0, 0), np.float32)
    for part in (part for part in facts if part.keys):
        lists.append(pa.array(part.keys))
        parts.append((part.pictures, part.pixels, part.captions))
        _append(looks.hashes, part.hashes)
        _append(looks.small, part.small)
        _append(embeddings, part.embeddings)
    if not parts:
        return {}
    keys = pa.chunked_array(lists)
    pictures, pixels, captions = map(np.concatenate, zip(*parts, strict=True))
    parts.clear()
    first, node = first_places(pictures)
    pictures, pixels = pictures[first], pixels[first]
    for column in (*looks, embeddings):
        _select(column, first)
    pairs = similar_pictures(looks, looks, config)
    if config.duplicates.min_cosine is not None:
        pairs = np.concatenate([pairs, close_embeddings(embeddings, config.duplicates.min_cosine)])
    links = coo_matrix((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(len(pictures),) * 2)
    groups = connected_components(links, directed=False)[1]
    order = np.lexsort((pictures, -pixels, groups))
    best = order[np.unique(groups[order], return_index=True)[1]][groups]  # of each picture's group
    near = best[node] != node
    earlier = _earliest(node, captions)
    repeated = ~near & (earlier != np.arange(len(keys)))
    decision: Decision = {}
    for reason, rows, others in ((NEAR, near, first[best[node]]), (REPEATED_PAIR, repeated, earlier)):
        dropped, stays = (keys.take(places[rows]).to_pylist() for places in (np.arange(len(keys)), others))
        decision |= {key: (reason, other) for key, other in zip(dropped, stays, strict=True)}
    return decision


def _earliest(pictures: Integers, captions: npt.NDArray[np.uint64]) -> Integers:
    """Return for each row the first row with the same picture and captions."""
    order = np.lexsort((captions, pictures))  # stable: of equal pairs, the first row comes first
    other = (np.diff(pictures[order]) != 0) | (np.diff(captions[order]) != 0)
    starts = np.flatnonzero(np.append(True, other))
    result = np.empty_like(order)
    result[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return result


def drop_duplicates(batch: Batch, decision: Decision, config: CurateConfig) -> Batch:
    """Drop the rows of the decision."""
    places = {place: decision[key] for place, key in enumerate(batch[KEY]) if key in decision}
    return drop(batch, places)


class Looks(NamedTuple):
    """How pictures look."""

    hashes: Hashes  # (N, V), the first of the whole picture
    small: npt.NDArray[np.uint8]  # (N, 16, 16)


def _append(column: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
    """Append rows to an array in place: the looks of millions of pictures are not in memory twice."""
    column.resize((len(column) + len(rows), *rows.shape[1:]), refcheck=False)
    column[len(column) - len(rows) :] = rows


def _select(column: npt.NDArray[Any], places: Integers) -> None:
    """Keep the rows at these places, which ascend, in place."""
    for start in range(0, len(places), _BLOCK):
        block = places[start : start + _BLOCK]
        column[start : start + len(block)] = column[block]
    column.resize((len(places), *column.shape[1:]), refcheck=False)


def first_places(values: Integers) -> tuple[Integers, Integers]:
    """Return the first place of each different value, in ascending order, and which of these values each row has."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[number]


def similar_pictures(first: Looks, second: Looks, config: CurateConfig) -> Integers:
    """Return the places (P, 2) of near-duplicates: a view of a first picture looks like a second picture.

    A picture is no near-duplicate of itself, if `first` is `second`. A pair may occur several times.
    """
    base, rules = second.hashes[:, 0], config.duplicates
    both = np.concatenate([base, mirrored(base)])
    matches = similar(first.hashes, both, rules.max_distance, config.num_workers)
    views = np.stack([matches[:, 1], matches[:, 2] // len(base)], 1)
    pairs = np.stack([matches[:, 0], matches[:, 2] % len(base)], 1)
    if first is second:
        different = pairs[:, 0] != pairs[:, 1]
        pairs, views = pairs[different], views[different]
    return pairs[alike(first.small[pairs[:, 0]], second.small[pairs[:, 1]], views, rules.crops)]


def similar(queries: Hashes, hashes: Hashes, max_distance: int, num_threads: int = 1) -> Integers:
    """Return places i, v, j (P, 3): `queries[i, v]` and `hashes[j]` differ in at most `max_distance` bits; sorted.

    `queries` is (N, V), `hashes` is (M,). No pair is missed. The bits are dealt out to `max_distance + k` bands.
    Different bits lie in at most `max_distance` bands, so at least k bands are equal: hashes are compared if they have
    equal bits in some k bands (Manku et al. 2007, "Detecting Near-Duplicates for Web Crawling", section 3).
    """
    flat = queries.reshape(-1)
    bands, num_equal = _bands(len(hashes), len(flat), max_distance)
    search = _Search(flat, _Table(hashes), bands, num_equal, max_distance)
    pairs = [np.empty((0, 2), np.int64)]
    selections = list(itertools.combinations(range(len(bands)), num_equal))
    with ThreadPoolExecutor(num_threads) as pool:  # numpy's functions run beside those of other threads
        for chosen in tqdm(selections, "compare hashes", unit=" selections", leave=False, delay=PATIENCE):
            mask = np.bitwise_or.reduce(bands[list(chosen)])
            search.table.fill(mask)
            pairs += pool.map(partial(search.near, mask), range(0, len(flat), _LOOKED_UP))
    query, place = np.concatenate(pairs).T
    order = np.lexsort((place, query))
    return np.stack([*np.divmod(query, queries.shape[1]), place], 1)[order]


def _bands(num_hashes: int, num_queries: int, max_distance: int) -> tuple[Hashes, int]:
    """Return the bits of each band as a mask, and the number of equal bands that takes the least work.

    With more equal bands there are more selections of bands, and fewer candidates in each.
    """
    bits = np.delete(np.uint64(1) << np.arange(64, dtype=np.uint64), 7)  # without that of the mean brightness

    def work(num_equal: int) -> float:  # relative to a lookup
        share = 0.5 ** min(len(bits) * num_equal / (max_distance + num_equal), _Table.size_of(num_hashes))
        lookups = num_queries * (1 + 2 * share * num_hashes)
        return float(math.comb(max_distance + num_equal, num_equal) * (4 * num_hashes + lookups))

    num_equal = min(range(1, 9), key=work)
    count = max_distance + num_equal
    return np.array([np.bitwise_or.reduce(bits[band::count]) for band in range(count)]), num_equal


class _Search(NamedTuple):
    """Queries (N * V,), a table of hashes, the bits of the bands, the number of equal bands, the largest distance."""

    queries: Hashes
    table: "_Table"
    bands: Hashes
    num_equal: int
    max_distance: int

    def near(self, mask: np.uint64, start: int) -> Integers:
        """Return the places (P, 2) of near queries and hashes, for a block of queries with equal bits in `mask`.

        Of several selections of bands that find a pair, the first returns it.
        """
        block = self.queries[start : start + _LOOKED_UP]
        pairs = [np.empty((0, 2), np.int64)]
        for query, place in self.table.candidates(block, mask):
            different = block.take(query) ^ self.table.hashes.take(place)
            close = np.bitwise_count(different) <= self.max_distance
            if mask != self._first_equal(np.zeros(1, np.uint64)):
                close &= different != 0  # the first selection finds equal hashes
            near = np.flatnonzero(close)
            near = near[self._first_equal(different[near]) == mask]
            pairs.append(np.stack([query[near] + start, place[near]], 1))
        return np.concatenate(pairs)

    def _first_equal(self, different: Hashes) -> Hashes:
        """Return the bits of the first equal bands of two hashes, for their different bits (P,)."""
        equal = (different[:, None] & self.bands) == 0  # (P, bands)
        first = equal & (np.cumsum(equal, 1) <= self.num_equal)
        bits: Hashes = np.bitwise_or.reduce(np.where(first, self.bands, np.uint64(0)), 1)
        return bits


class _Table:
    """A table of buckets: which hashes have some bits in common. Hashes with other bits may share a bucket."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        self._shift = np.uint64(64 - self.size_of(len(hashes)))
        size = 1 << self.size_of(len(hashes))
        self._counts = np.zeros(size, np.uint8)  # of the hashes in each bucket; 255 stands for as many or more
        self._starts = np.empty(size, np.uint32)  # of used buckets, in `_places`

    @staticmethod
    def size_of(num_hashes: int) -> int:
        """Return the number of bits of a bucket's number."""
        return min(24, num_hashes.bit_length() + 3)

    def _buckets(self, hashes: Hashes, mask: np.uint64) -> Integers:
        buckets = (hashes & mask) * _MULTIPLIER
        buckets >>= self._shift
        return buckets.view(np.int64)  # numpy looks up int64 faster

    def fill(self, mask: np.uint64) -> None:
        """Put each hash into the bucket of its bits in `mask`."""
        entries = self._buckets(self.hashes, mask)
        entries <<= 32
        entries |= np.arange(len(entries))
        entries.sort()
        self._places = (entries & 0xFFFFFFFF).astype(np.uint32)
        entries >>= 32
        starts = np.flatnonzero(np.diff(entries, prepend=-1))
        used, counts = entries.take(starts), np.diff(starts, append=len(entries))
        self._counts[:] = 0
        self._counts[used] = np.minimum(counts, _MANY)
        self._starts[used] = starts
        many = np.flatnonzero(counts >= _MANY)
        self._full, self._exact = used[many], counts[many]  # the full buckets, in ascending order, and their counts

    def candidates(self, queries: Hashes, mask: np.uint64) -> Iterator[tuple[Integers, Integers]]:
        """Yield places in `queries` and in the hashes that share a bucket, about `_CANDIDATES` at a time."""
        buckets = self._buckets(queries, mask)
        counts = self._counts.take(buckets)
        hits = np.flatnonzero(counts)
        buckets, counts = buckets.take(hits), counts.take(hits).astype(np.int64)
        many = np.flatnonzero(counts == _MANY)
        counts[many] = self._exact.take(np.searchsorted(self._full, buckets.take(many)))
        starts = self._starts.take(buckets).astype(np.int64)
        ends = np.cumsum(counts)
        begin = 0
        while begin < len(hits):
            before = ends[begin - 1] if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, before + _CANDIDATES, "right")))
            block = counts[begin:stop]
            first = np.repeat(starts[begin:stop] - (ends[begin:stop] - block - before), block)
            yield np.repeat(hits[begin:stop], block), self._places.take(first + np.arange(len(first))).astype(np.int64)
            begin = stop


def alike(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], views: Integers, crops: bool
) -> npt.NDArray[np.bool_]:
    """Return whether coefficients are correlated: of views v of first thumbnails and of second thumbnails (P, S, S).

    `views` are v and whether the view is mirrored (P, 2). Signs alone agree by chance in a large set; coefficients do
    not.
    """
    result = np.zeros(len(views), bool)
    signs = np.where(np.arange(_FREQUENCIES) % 2, -1, 1) ** views[:, 1:, None]  # (P, 1, 8)
    for start in range(0, len(views), _BLOCK):
        block = slice(start, start + _BLOCK)
        count = len(views[block])
        left = coefficients(first[block], crops)[np.arange(count), views[block, 0]] * signs[block]
        right = coefficients(second[block], False)[:, 0]
        left, right = left.reshape(count, -1)[:, 1:], right.reshape(count, -1)[:, 1:]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        result[block] = (left * right).sum(1) >= _MIN_CORRELATION * norms
    return result
