"""Time and memory of a search in a million images, and the recall of the approximate search.

    python recipes/benchmarks/search.py                       # 1,000,000 x 512; 5 GB of disk for minutes
    python recipes/benchmarks/search.py --rows 100000

Bars of the project, on 2 cores: exact at most 200 ms per single query in at most 1.2 GB, approximate at most 10 ms with
recall@10 of 0.95 or more against exact. Vectors form clusters, as embeddings do: one cluster per 100 vectors, with a
centre in a subspace of 64 dimensions; half of a vector's length is its own. Queries are "near" (other vectors of the
clusters, as in a search by image) or "far" (at twice the distance, as in a search by text). Memory is the peak of a
process that opens the index and searches, minus its memory after it has loaded its libraries.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from ratios import hardware
from torch import Tensor
from tqdm.auto import tqdm

from koclip.embeddings.store import SHARD, Entry, Shards, Store, StoredItem, write_shard
from koclip.search import open_index
from koclip.search.build import ROWS
from koclip.search.index import PROBED, build_approximate, faiss, open_approximate

QUICK = "approximate.faiss"
_SUBSPACE = 64
_K = 10


def centres_of(count: int, width: int) -> Tensor:
    """Return the centres (C, D) of the clusters."""
    random = torch.Generator().manual_seed(0)
    low = torch.randn(max(1, count // 100), _SUBSPACE, generator=random)
    return F.normalize(low @ torch.randn(_SUBSPACE, width, generator=random), dim=-1)


def draw(centres: Tensor, count: int, seed: int, distance: float = 1.0) -> Tensor:
    """Return unit-norm vectors (count, D) around centres."""
    random = torch.Generator().manual_seed(seed)
    chosen = centres[torch.randint(len(centres), (count,), generator=random)]
    noise = F.normalize(torch.randn(count, centres.shape[1], generator=random), dim=-1)
    return F.normalize(chosen + distance * noise, dim=-1)


def make(folder: Path, count: int, width: int) -> None:
    """Write an exact index of drawn vectors."""
    centres = centres_of(count, width)
    starts = range(0, count, ROWS)
    for number, start in enumerate(tqdm(starts, desc="drawing", leave=False)):
        rows = draw(centres, min(ROWS, count - start), seed=number + 1)
        keys = [str(start + row) for row in range(len(rows))]
        items = [StoredItem(key, bytes(16)) for key in keys]
        entries = [Entry({"key": key}) for key in keys]
        write_shard(folder / SHARD.format(number), rows.to(torch.bfloat16).unsqueeze(1), items, entries)
    names = [SHARD.format(number) for number in range(len(starts))]
    Store(folder, "index").write_facts({"num_images": count, "shards": names, "approximate": None})


def held() -> float:
    """Return the memory of this process, MB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Search for one query at a time and return milliseconds, memory, and the results."""
    if args.way == "approximate":
        faiss().omp_set_num_threads(args.threads)
    before = held()
    index = open_index(folder)
    if args.way == "approximate":
        index._approximate = open_approximate(folder / QUICK)
        index._approximate._index.nprobe = args.probed
    search = index.exact if args.way == "exact" else index.search
    centres = centres_of(len(index), index.width)
    queries = draw(centres, args.queries, seed=0, distance=2.0 if args.kind == "far" else 1.0)
    for query in queries[:3]:  # reads the pages
        search(query[None], _K)
    taken, places = [], []
    for query in queries:
        began = time.perf_counter()
        results = search(query[None], _K)
        taken.append(1_000 * (time.perf_counter() - began))
        places.append(results.places[0].tolist())
    grouped = time.perf_counter()
    if args.way == "exact":
        index.exact(queries[:16], _K)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "ms": statistics.median(taken),
        "worst_ms": max(taken),
        "grouped_ms": 1_000 * (time.perf_counter() - grouped) / min(16, len(queries)),
        "peak_mb": peak - before,
        "process_mb": peak,
        "places": places,
    }


def alone(folder: Path, args: argparse.Namespace, **options: object) -> dict[str, object]:
    """Measure in its own process."""
    words = [f"--{name}={value}" for name, value in {**vars(args), **options, "folder": folder}.items()]
    ran = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    result: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return result


def recall(places: object, exact: object) -> float:
    """Return the share of the exact neighbours among `places`."""
    pairs = zip(np.array(places), np.array(exact), strict=True)
    return float(np.mean([len(set(approximate) & set(expected)) / _K for approximate, expected in pairs]))


def report(args: argparse.Namespace, folder: Path) -> None:
    """Make the index, measure and print."""
    make(folder, args.rows, args.width)
    print(f"{hardware()}; {args.rows:,} x {args.width}, {args.threads} threads, {args.queries} queries, median (worst)")
    exact = {kind: alone(folder, args, way="exact", kind=kind) for kind in ("near", "far")}
    for kind, measured in exact.items():
        line = f"{measured['ms']:.0f} ms ({measured['worst_ms']:.0f}), "
        line += f"in groups of 16 {measured['grouped_ms']:.0f} ms per query"
        print(f"exact, {kind}: {line}; {measured['peak_mb']:,.0f} MB (the process {measured['process_mb']:,.0f} MB)")
    began = time.perf_counter()
    faiss().omp_set_num_threads(args.threads)
    shards = Shards([folder / SHARD.format(number) for number in range(-(-args.rows // ROWS))], "index")
    build_approximate(shards.rows, shards.width, folder / QUICK)
    size = (folder / QUICK).stat().st_size / 2**20
    print(f"approximate index made in {(time.perf_counter() - began) / 60:.1f} minutes, {size:,.0f} MB")
    for probed in (16, 32, 64, 128):
        for kind in ("near", "far"):
            measured = alone(folder, args, way="approximate", kind=kind, probed=probed)
            share = recall(measured["places"], exact[kind]["places"])
            line = f"{measured['ms']:.1f} ms ({measured['worst_ms']:.1f}), recall@{_K} {share:.3f}"
            print(f"approximate, {probed} lists, {kind}: {line}; {measured['peak_mb']:,.0f} MB")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("--rows", type=int, default=1_000_000)
    cli.add_argument("--width", type=int, default=512)
    cli.add_argument("--queries", type=int, default=100)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--folder", default="", help="where an index lies; used by the script itself")
    cli.add_argument("--way", choices=["exact", "approximate"], default="exact")
    cli.add_argument("--kind", choices=["near", "far"], default="near")
    cli.add_argument("--probed", type=int, default=PROBED)
    return cli


def main() -> None:
    """Parse and run."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.folder:
        print(json.dumps(measure(Path(args.folder), args)))
        return
    folder = Path(tempfile.mkdtemp(prefix="koclip-search-"))
    try:
        report(args, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
