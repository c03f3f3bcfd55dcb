"""Find the images of an index that are nearest to a query: an exact search over all of them, or an approximate search.

The approximate search is faiss's `IVF,SQ8` (Jégou et al. 2011, without product codes): images are divided into lists
around centres, and only the nearest lists are searched. A value takes 8 bits, a quarter of fp32. The candidates are
scored again from the stored rows, so only images in the other lists can be missed.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from koclip import storage
from koclip.config import ConfigError, check
from koclip.embeddings.store import FACTS, Entry, Shards, Store

FILE = "approximate-{}.faiss"  # with a hash of the embeddings
MOST = 1_000  # results that are asked of it; for more all images are looked at
FACTOR = 4  # candidates per result
PROBED = 64  # lists looked at; measured by recipes/benchmarks/search.py
_PER_LIST = 64  # images per list that the centres are found from
_ITERATIONS = 10  # of k-means; faiss's 25 gain nothing in recall here


class Quick:
    """An approximate index.

    Args:
        index: Of faiss.
        probed: Lists looked at.
    """

    def __init__(self, index: Any, probed: int = PROBED) -> None:
        self._index = index
        index.nprobe = min(probed, index.nlist)

    def __len__(self) -> int:
        """Number of images in it."""
        return int(self._index.ntotal)

    def likely(self, query: torch.Tensor, k: int) -> torch.Tensor:
        """Return the places of at most k images, ascending, that are likely the nearest to a query (D,) float32."""
        _, places = self._index.search(np.ascontiguousarray(query.numpy()[None]), k)
        return torch.from_numpy(np.sort(places[0][places[0] >= 0]))


def faiss() -> Any:
    """Return the library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "index: approximate search needs faiss, which is not installed: pip install 'koclip[search]', or build the "
            "index with --approximate no"
        ) from error
    return faiss


def build_quick(rows: Sequence[torch.Tensor], width: int, path: Path) -> None:
    """Build the approximate index of some shards' rows (n, D) bf16 each; the file is complete or absent.

    Raises:
        ConfigError: faiss is not installed, or there is no row.
    """
    library, total = faiss(), sum(map(len, rows))
    check(total > 0, "index", 0, "expected at least one image")
    lists = max(1, min(4 * math.isqrt(total), total // 39))  # faiss wants 39 images to find a centre from
    index = library.index_factory(width, f"IVF{lists},SQ8", library.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed = _ITERATIONS, 0
    index.train(_sample(rows, min(total, lists * _PER_LIST)))
    with tqdm(desc="approximate index", total=total, unit=" images", leave=False) as bar:
        for part in rows:
            if len(part):
                index.add(part.float().numpy())
                bar.update(len(part))
    with storage.atomic(path) as partial:
        library.write_index(index, str(partial))


def open_quick(path: Path) -> Quick:
    """Open an approximate index, memory-mapped.

    Raises:
        ConfigError: it is broken, or faiss is not installed.
    """
    library = faiss()
    try:
        return Quick(library.read_index(str(path), library.IO_FLAG_MMAP_IFC))
    except RuntimeError as error:
        raise ConfigError(f"index: {path} is broken; delete it and run the same command again") from error


def _sample(rows: Sequence[torch.Tensor], count: int) -> Any:
    """Return `count` rows (count, D) float32, drawn from all shards with a seed of its own."""
    starts = np.cumsum([0, *map(len, rows)])
    places = np.sort(np.random.default_rng(0).permutation(int(starts[-1]))[:count])
    numbers = np.searchsorted(starts, places, side="right") - 1
    parts = [
        rows[number][torch.from_numpy(places[numbers == number] - starts[number])] for number in np.unique(numbers)
    ]
    return torch.cat(parts).float().numpy()


_QUERIES = 16  # scored at once: 4 bytes per image and query
_scanning = threading.Lock()  # the number of threads is the whole process's
_GATHERED = 65_536  # rows scored again at once
# How far a score may be off that is computed in bf16 from a query of norm 1 and a row of norm 1. The query is rounded
# to 8 bits: each part is off by 2^-8 of itself at most, and so is a sum of products whose sizes add up to 1 at most.
# The score is rounded likewise. Sums of products in fp32 add less than a tenth of that for any width in use.
_MARGIN = 2.1 * 2**-8


class Found(NamedTuple):
    """The nearest images of Q queries, the nearest first."""

    scores: torch.Tensor  # (Q, k) float32, cosine similarities
    places: torch.Tensor  # (Q, k) int64, rows of the index


class ImageIndex:
    """An index, memory-mapped: opening it reads next to nothing.

    Args:
        shards: Its embeddings, and what is kept of each image.
        facts: What it says of itself: `model`, `fingerprint`, `images` and more.
        quick: What finds the likely ones; None looks at all.

    Raises:
        ConfigError: `quick` holds another number of images.
    """

    def __init__(self, shards: Shards, facts: dict[str, Any], quick: Quick | None = None) -> None:
        expected = f"expected {len(shards)}: delete that file, and run the command that makes the index again"
        made_of = len(shards) if quick is None else len(quick)
        check(made_of == len(shards), "index: approximate index, images", made_of, expected)
        self.facts = facts
        self._shards, self._quick = shards, quick

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self._shards.width

    @property
    def is_approximate(self) -> bool:
        """Whether `search` looks at the likely images only."""
        return self._quick is not None

    def entry(self, place: int) -> Entry:
        """Return what is kept of an image: record and thumbnail."""
        return self._shards.entry(place)

    def search(self, queries: torch.Tensor, k: int) -> Found:
        """Return the k nearest images (all, where there are fewer) of unit-norm queries (Q, D) float32.

        With an approximate index, nearly all of the k are the nearest, and k is at most 1,000.
        """
        if self._quick is None or k > MOST:
            return self.exact(queries, k)
        self._check(queries, k)
        return _stacked([self._rescore(query, self._likely(query, k), k) for query in queries.float()])

    def exact(self, queries: torch.Tensor, k: int) -> Found:
        """Return the same by looking at all: the k best fp32 scores of the stored rows; of equal ones the first.

        Every row is scored in bf16, half the memory and time of fp32. Those within twice the largest rounding error
        of the k-th best are scored again in fp32: no other row can be among the k best.
        """
        self._check(queries, k)
        k = min(k, len(self))
        results: list[Found] = []
        for part in queries.float().split(_QUERIES):
            for rough, query in zip(self._scan(part.bfloat16()), part, strict=True):
                least = rough.topk(k).values[-1] - 2 * _MARGIN
                results.append(self._rescore(query, (rough >= least).nonzero()[:, 0], k))
        return _stacked(results)

    def _scan(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the scores (Q, N) of bf16 queries (Q, D), a part of the shards by each thread."""
        scores = torch.empty(len(queries), len(self))
        columns = queries.T.contiguous() if len(queries) > 1 else queries[0]  # a vector is read faster as such

        def score(numbers: Any) -> None:
            for number in numbers:
                rows, start = self._shards.rows[number], self._shards.starts[number]
                if len(rows):  # none of a shard's images may have been usable
                    scores[:, start : start + len(rows)] = (rows @ columns).reshape(len(rows), -1).T

        with _single_threads() as (workers, count):
            list(workers.map(score, np.array_split(range(len(self._shards.rows)), count)))
        return scores

    def _likely(self, query: torch.Tensor, k: int) -> torch.Tensor:
        assert self._quick is not None
        places = self._quick.likely(query, min(FACTOR * k, len(self)))
        if len(places) >= min(k, len(self)):
            return places
        return torch.arange(len(self))  # what was looked at holds fewer than k: take all

    def _rescore(self, query: torch.Tensor, places: torch.Tensor, k: int) -> Found:
        parts = [self._shards.gather(part) @ query for part in places.split(_GATHERED)]
        scores = torch.cat(parts)
        order = scores.argsort(descending=True, stable=True)[: min(k, len(self))]
        return Found(scores[order].clamp(-1, 1), places[order])  # stored rows may be a little longer than 1

    def _check(self, queries: torch.Tensor, k: int) -> None:
        check(len(self) > 0, "index", 0, "it holds no image: build it again")
        fits = queries.ndim == 2 and len(queries) > 0 and queries.shape[1] == self.width
        check(fits, "queries", tuple(queries.shape), f"expected (Q, {self.width}): the model that made the index")
        check(bool(queries.isfinite().all()), "queries", "values that are not finite", "expected embeddings of norm 1")
        norms = queries.float().norm(dim=1)
        unit = bool(((norms - 1).abs() < 1e-2).all())
        check(unit, "queries", [round(norm, 3) for norm in norms.tolist()[:3]], "expected embeddings of norm 1")
        check(k >= 1, "k", k, "expected 1 or more")


def _stacked(results: Sequence[Found]) -> Found:
    """Return the results of several queries as one."""
    scores, places = zip(*results, strict=True)
    return Found(torch.stack(scores), torch.stack(places))


@contextmanager
def _single_threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield threads that compute alone, and their number: that of torch's.

    A shard takes less time than the threads of one product take to meet, above all on a busy CPU.
    """
    with _scanning:
        count = torch.get_num_threads()
        torch.set_num_threads(1)  # what threads that are made now begin with
        try:
            with ThreadPoolExecutor(count) as workers:
                yield workers, count
        finally:
            torch.set_num_threads(count)


def open_index(directory: str | Path) -> ImageIndex:
    """Open what `recipes/index.py` made.

    Raises:
        ConfigError: there is none, it is broken, or it is not finished.
    """
    directory = Path(directory)
    facts = Store(directory, "index").facts()
    command = "koclip index --model <model> --images <folder> --output_dir <index>"
    if facts is None:
        raise ConfigError(f"index: got {directory}, expected a directory with {FACTS}; this builds it: {command}")
    num_images = facts.get("num_images")
    again = "the command that makes it goes on where it stopped: run it again"
    check(isinstance(num_images, int), "index", str(directory), f"it is not finished; {again}")
    paths = [directory / name for name in facts["shards"]]
    quick = directory / facts["approximate"] if facts["approximate"] else None
    missing = [path.name for path in [*paths, *([quick] if quick else [])] if not path.exists()]
    check(not missing, f"index: {directory}, missing files", missing[:3], again)
    shards = Shards(paths, "index")
    check(len(shards) == num_images, f"index: {directory}, images", len(shards), f"expected {num_images}; {again}")
    return ImageIndex(shards, facts, open_quick(quick) if quick else None)
