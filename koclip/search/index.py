"""Find the nearest images of a query in an index: an exact search over all images, or an approximate search.

The approximate search is faiss's `IVF,SQ8` (Jégou et al. 2011, without product codes): images are clustered into lists,
and only the nearest lists are searched. A value takes 8 bits, a quarter of fp32. The candidates are scored again from
the stored embeddings, so the search can miss only images in other lists.
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
from koclip.classifiers.conformal import TooFewScoresError
from koclip.config import ConfigError, check
from koclip.embeddings.store import FACTS, Entry, Shards, Store

FILE = "approximate-{}.faiss"  # with a hash of the embeddings
MOST = 1_000  # results of an approximate search at most; a larger k searches all images
FACTOR = 4  # candidates per result
PROBED = 64  # lists searched; measured by recipes/benchmarks/search.py
_PER_LIST = 64  # images per list for k-means
_ITERATIONS = 10  # of k-means; faiss's default of 25 does not improve recall here


class ApproximateIndex:
    """An approximate index: an index of faiss, of whose lists `probed` are searched."""

    def __init__(self, index: Any, probed: int = PROBED) -> None:
        self._index = index
        index.nprobe = min(probed, index.nlist)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def candidates(self, query: torch.Tensor, k: int) -> torch.Tensor:
        """Return the rows, ascending, of at most k images that are probably nearest to a query (D,) float32."""
        _, rows = self._index.search(np.ascontiguousarray(query.numpy()[None]), k)
        return torch.from_numpy(np.sort(rows[0][rows[0] >= 0]))


def faiss() -> Any:
    """Import faiss.

    Raises:
        ConfigError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "index: approximate search needs faiss, which is not installed: pip install 'koclip[search]', or build the "
            "index with --approximate no"
        ) from error
    return faiss


def build_approximate(rows: Sequence[torch.Tensor], width: int, path: Path) -> None:
    """Build the approximate index of the embeddings (n, D) bf16 of each shard. The file is complete or absent.

    Raises:
        ConfigError: faiss is not installed, or there is no embedding.
    """
    library, total = faiss(), sum(map(len, rows))
    check(total > 0, "index", 0, "expected at least one image")
    lists = max(1, min(4 * math.isqrt(total), total // 39))  # faiss wants at least 39 images per list
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


def open_approximate(path: Path) -> ApproximateIndex:
    """Open an approximate index, memory-mapped.

    Raises:
        ConfigError: the file is broken, or faiss is not installed.
    """
    library = faiss()
    try:
        return ApproximateIndex(library.read_index(str(path), library.IO_FLAG_MMAP_IFC))
    except RuntimeError as error:
        raise ConfigError(f"index: {path} is broken; delete it and run the same command again") from error


def _sample(rows: Sequence[torch.Tensor], count: int) -> Any:
    """Return `count` random embeddings (count, D) float32 of all shards, with a fixed seed."""
    starts = np.cumsum([0, *map(len, rows)])
    chosen = np.sort(np.random.default_rng(0).permutation(int(starts[-1]))[:count])
    numbers = np.searchsorted(starts, chosen, side="right") - 1
    parts = [
        rows[number][torch.from_numpy(chosen[numbers == number] - starts[number])] for number in np.unique(numbers)
    ]
    return torch.cat(parts).float().numpy()


_QUERIES = 16  # scored at once: 4 bytes per image and query
_scanning = threading.Lock()  # `torch.set_num_threads` acts on the whole process
_GATHERED = 65_536  # embeddings scored again at once
# Largest error of a bf16 score of a query and an embedding of norm 1. Rounding the query to 8 bits changes each product
# by at most 2^-8 of its size, and the sizes add up to at most 1. Rounding the score adds as much again. The fp32 sum
# adds less than a tenth of this at all widths in use.
_MARGIN = 2.1 * 2**-8


class SearchResult(NamedTuple):
    """The nearest images of Q queries, the nearest first."""

    scores: torch.Tensor  # (Q, k) float32, cosine similarities
    places: torch.Tensor  # (Q, k) int64, rows of the index


class ImageIndex:
    """A memory-mapped index. Opening it reads only headers.

    `facts` are the contents of embeddings.json: `model`, `fingerprint`, `images` and more. Without `approximate`, a
    search scores all images.

    Raises:
        ConfigError: `approximate` holds another number of images.
    """

    def __init__(self, shards: Shards, facts: dict[str, Any], approximate: ApproximateIndex | None = None) -> None:
        expected = f"expected {len(shards)}: delete the file and build the index again"
        count = len(shards) if approximate is None else len(approximate)
        check(count == len(shards), "index: approximate index, images", count, expected)
        self.facts = facts
        self._shards, self._approximate = shards, approximate

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def width(self) -> int:
        """Width D of the embeddings."""
        return self._shards.width

    @property
    def is_approximate(self) -> bool:
        """Whether `search` is approximate."""
        return self._approximate is not None

    @property
    def checksum(self) -> str:
        """A hash of the embeddings."""
        return self._shards.checksum

    @property
    def digests(self) -> list[bytes]:
        """The hash of each image's content (N,), 16 bytes."""
        return [digest.ljust(16, b"\0") for digest in self._shards.embedded.tolist()]

    def entry(self, place: int) -> Entry:
        """Return the record and the thumbnail of an image."""
        return self._shards.entry(place)

    @property
    def promises(self) -> dict[str, list[float]]:
        """By language, the shares `alpha` for which the index has a threshold; {} without calibration."""
        languages = (self.facts.get("calibration") or {}).get("languages", {})
        return {
            language: [float(alpha) for alpha, threshold in own["thresholds"].items() if threshold is not None]
            for language, own in languages.items()
        }

    def threshold(self, alpha: float, language: str) -> float:
        """Return the score above which a query shows something with a chance of at most `alpha`, if it has no match.

        Args:
            alpha: One of those that the index was calibrated for.
            language: The language of the query.

        Raises:
            TooFewScoresError: the calibration set is too small for this alpha.
            ConfigError: the index is not calibrated, or not for this language or alpha.
        """
        calibration = self.facts.get("calibration") or {}
        again = "run `koclip index` again with --calibration.path <captions>, which embeds no image again"
        check(bool(calibration), "index, calibration", None, again)
        languages = calibration["languages"]
        check(language in languages, "language", language, f"expected one of {list(languages)}, or {again}")
        thresholds, name = languages[language]["thresholds"], f"{alpha:g}"
        check(name in thresholds, "alpha", alpha, f"expected one of {list(thresholds)}, or {again}, --alphas [{name}]")
        if thresholds[name] is None:
            raise TooFewScoresError(alpha, languages[language]["images"], language)
        return float(thresholds[name])

    def matches(self, queries: torch.Tensor, k: int, alpha: float, language: str) -> list[SearchResult]:
        """Return for each query (Q, D) the nearest images that are a match: at most k, and there may be none.

        A match scores above `threshold(alpha, language)`. Scores and places are (m,), m <= k.

        Raises:
            ConfigError: those of `threshold`, or the queries do not fit.
        """
        threshold, results = self.threshold(alpha, language), self.search(queries, k)
        return [
            SearchResult(scores[scores > threshold], places[scores > threshold])
            for scores, places in zip(results.scores, results.places, strict=True)
        ]

    def search(self, queries: torch.Tensor, k: int) -> SearchResult:
        """Return the k nearest images, or all if there are fewer, of unit-norm queries (Q, D) float32.

        With an approximate index and k up to 1,000, a few of the nearest images may be missed.
        """
        if self._approximate is None or k > MOST:
            return self.exact(queries, k)
        self._check(queries, k)
        return _stacked([self._rescore(query, self._candidates(query, k), k) for query in queries.float()])

    def exact(self, queries: torch.Tensor, k: int) -> SearchResult:
        """Search all images; return the k best fp32 scores of the stored embeddings. Of equal scores the first wins.

        Every image is scored in bf16, which takes half the memory and time of fp32. Images within twice the largest
        rounding error of the k-th best are scored again in fp32. No other image can be among the k best.
        """
        self._check(queries, k)
        k = min(k, len(self))
        results: list[SearchResult] = []
        for part in queries.float().split(_QUERIES):
            for rough, query in zip(self._scan(part.bfloat16()), part, strict=True):
                least = rough.topk(k).values[-1] - 2 * _MARGIN
                results.append(self._rescore(query, (rough >= least).nonzero()[:, 0], k))
        return _stacked(results)

    def _scan(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the scores (Q, N) of bf16 queries (Q, D). The shards are divided among threads."""
        scores = torch.empty(len(queries), len(self))
        columns = queries.T.contiguous() if len(queries) > 1 else queries[0]  # a matrix-vector product is faster

        def score(numbers: Any) -> None:
            for number in numbers:
                rows, start = self._shards.rows[number], self._shards.starts[number]
                if len(rows):  # a shard may have no usable image
                    scores[:, start : start + len(rows)] = (rows @ columns).reshape(len(rows), -1).T

        with _single_threads() as (workers, count):
            list(workers.map(score, np.array_split(range(len(self._shards.rows)), count)))
        return scores

    def _candidates(self, query: torch.Tensor, k: int) -> torch.Tensor:
        assert self._approximate is not None
        places = self._approximate.candidates(query, min(FACTOR * k, len(self)))
        if len(places) >= min(k, len(self)):
            return places
        return torch.arange(len(self))  # the searched lists hold fewer than k images: score all

    def _rescore(self, query: torch.Tensor, places: torch.Tensor, k: int) -> SearchResult:
        scores = torch.cat([self._shards.gather(part) @ query for part in places.split(_GATHERED)])
        order = scores.argsort(descending=True, stable=True)[: min(k, len(self))]
        return SearchResult(scores[order].clamp(-1, 1), places[order])  # bf16 norms can be slightly above 1

    def _check(self, queries: torch.Tensor, k: int) -> None:
        check(len(self) > 0, "index, images", 0, "expected at least one: build the index again")
        fits = queries.ndim == 2 and len(queries) > 0 and queries.shape[1] == self.width
        check(fits, "queries", tuple(queries.shape), f"expected (Q, {self.width}): use the model of the index")
        check(bool(queries.isfinite().all()), "queries", "values that are not finite", "expected embeddings of norm 1")
        norms = queries.float().norm(dim=1)
        unit = bool(((norms - 1).abs() < 1e-2).all())
        check(unit, "queries", [round(norm, 3) for norm in norms.tolist()[:3]], "expected embeddings of norm 1")
        check(k >= 1, "k", k, "expected 1 or more")


def _stacked(results: Sequence[SearchResult]) -> SearchResult:
    scores, places = zip(*results, strict=True)
    return SearchResult(torch.stack(scores), torch.stack(places))


@contextmanager
def _single_threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield as many threads as torch uses, and their number. Each thread computes its products alone.

    The product of one shard is short: splitting it over threads would take longer than computing it.
    """
    with _scanning:
        count = torch.get_num_threads()
        torch.set_num_threads(1)  # new threads start with this setting
        try:
            with ThreadPoolExecutor(count) as workers:
                yield workers, count
        finally:
            torch.set_num_threads(count)


def open_index(directory: str | Path) -> ImageIndex:
    """Open an index that `koclip index` has built.

    Raises:
        ConfigError: the directory holds no index, or the index is broken or not finished.
    """
    directory = Path(directory)
    facts = Store(directory, "index").facts()
    command = "koclip index --model <model> --images <folder> --output_dir <index>"
    if facts is None:
        raise ConfigError(f"index: got {directory}, expected a directory with {FACTS}; build it with: {command}")
    num_images = facts.get("num_images")
    again = "run the command that builds it again: it continues where it stopped"
    check(isinstance(num_images, int), "index", str(directory), f"expected a finished index; {again}")
    paths = [directory / name for name in facts["shards"]]
    approximate = directory / facts["approximate"] if facts["approximate"] else None
    missing = [path.name for path in [*paths, *([approximate] if approximate else [])] if not path.exists()]
    check(not missing, f"index: {directory}, missing files", missing[:3], again)
    shards = Shards(paths, "index")
    check(len(shards) == num_images, f"index: {directory}, images", len(shards), f"expected {num_images}; {again}")
    return ImageIndex(shards, facts, open_approximate(approximate) if approximate else None)
