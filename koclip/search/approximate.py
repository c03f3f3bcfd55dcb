"""Approximate search by faiss: images are divided into lists around centres, and the nearest lists are looked at.

`IVF,SQ8` (Jégou et al. 2011, without product codes): 8 bits per value, a quarter of fp32. Its candidates are scored
again from the stored rows, so that only what was not looked at can be missed. It is built in minutes for a million
images where a graph (HNSW) takes an hour, and reads from a memory-mapped file.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from koclip import storage
from koclip.config import ConfigError, check

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


def build(rows: Sequence[torch.Tensor], width: int, path: Path) -> None:
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
