"""Time and memory of `koclip curate` for many rows: the rules for captions, near-duplicates by hash, and balance.

    python recipes/benchmarks/curation_scale.py                              # 100,000, 300,000 and 1,000,000 rows
    python recipes/benchmarks/curation_scale.py --rows 10000 --workers 1

The rows are generated: a Korean caption of 4 to 12 words, whose frequencies follow Zipf's law, and the facts that
koclip keeps of a picture (19 random hashes and a random thumbnail). 5 % are near-duplicates of the row before them.
There are no picture files, so decoding is not measured. Hashes of real pictures are less evenly spread than random
hashes: they give more candidates for near-duplicates.

Each number of rows runs in its own process. Memory is the peak of that process and of its largest worker, with the
libraries. Time is wall time, from the command to the written shards and report. It is also given for 10,000 rows:
where that stays the same, time is linear in the rows. Bars of the project: a million rows in at most 10 minutes on 2
cores and in at most 2 GB.
"""

import argparse
import functools
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ratios import hardware, run_worker

from koclip.config import SourceConfig
from koclip.config.curation import BalanceRules, CardRules, CurateConfig
from koclip.curation import pipeline
from koclip.curation.batch import KEY, Batch, kept_places
from koclip.curation.captions import filter_captions, text_hash
from koclip.curation.duplicates import HASHES, SMALL
from koclip.curation.pictures import PICTURE, PIXELS

_VIEWS, _SIDE = 19, 16  # of the hashes and the small thumbnail of a picture
_WRITTEN = 50_000  # captions that are written at a time
_SHARE = 0.05  # of near-duplicates


def main(words: Sequence[str] | None = None) -> None:
    """Measure each number of rows, and print the results."""
    options = parser().parse_args(words)
    if options.worker:
        print(json.dumps(measure(options.rows[0], options.workers, options.max_per_query)))
        return
    print(f"{hardware()}; {options.workers} workers")
    for rows in options.rows:
        own = ["--worker", "--rows", str(rows), "--workers", str(options.workers)]
        own += ["--max_per_query", str(options.max_per_query)]
        result = run_worker(__file__, own, f"{rows} rows")
        per_part, kept = result["seconds"] / rows * 10_000, int(result["kept"])
        memory, largest = result["memory"] / 1e9, result["worker_memory"] / 1e9
        print(f"{rows:,} rows: {result['seconds']:.1f} s ({per_part:.2f} s per 10,000 rows)")
        print(f"  memory {memory:.2f} GB, of a worker {largest:.2f} GB; {kept:,} rows kept")


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="numbers of rows")
    cli.add_argument("--workers", type=int, default=2, help="processes that check captions and write shards")
    cli.add_argument("--max_per_query", type=int, default=1_000, help="most pairs of a query")
    cli.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return cli


def measure(num_rows: int, num_workers: int, max_per_query: int) -> dict[str, float]:
    """Curate generated rows; return the seconds, the peaks of memory in bytes, and the number of kept rows."""
    pipeline.LOCAL = (filter_captions, add_generated_pictures)  # workers are forked: they have it, too
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "captions.parquet")
        write_captions(table, num_rows)
        config = CurateConfig(
            sources=[SourceConfig(path=str(table), name="generated", image=None, captions={"ko": "ko"})],
            output_dir=str(Path(folder, "curated")),
            balance=BalanceRules(max_per_query=max_per_query),
            card=CardRules(licenses={"generated": "cc0-1.0"}, origins={"generated": "curation_scale.py"}),
            num_workers=num_workers,
        )
        start = time.perf_counter()
        report = pipeline.curate(config)
        seconds = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "memory": own, "worker_memory": workers, "kept": report["rows"]["kept"]}


def write_captions(path: Path, num_rows: int) -> None:
    """Write a table with captions of random words; the word of rank r has the frequency 1 / r."""
    rng = np.random.default_rng(0)
    syllables = np.array([chr(code) for code in range(ord("가"), ord("힣") + 1, 7)])
    words = np.array(["".join(rng.choice(syllables, size)) for size in rng.integers(1, 4, size=50_000)])
    bounds = np.cumsum(1 / np.arange(1, len(words) + 1))
    with pq.ParquetWriter(path, pa.schema({"ko": pa.string()})) as writer:
        for start in range(0, num_rows, _WRITTEN):
            lengths = rng.integers(4, 13, size=min(_WRITTEN, num_rows - start))
            ranks = np.searchsorted(bounds, rng.random(lengths.sum()) * bounds[-1]).clip(max=len(words) - 1)
            captions = map(" ".join, np.split(words[ranks], np.cumsum(lengths)[:-1]))
            writer.write_table(pa.table({"ko": list(captions)}))


def add_generated_pictures(batch: Batch, config: CurateConfig) -> Batch:
    """Add what koclip keeps of pictures: for each batch the same, whichever process adds it."""
    keys = batch[KEY]
    rng = np.random.default_rng(text_hash(keys[0]))
    hashes = rng.integers(1 << 64, size=(len(keys), _VIEWS), dtype=np.uint64)
    small = rng.integers(256, size=(len(keys), _SIDE, _SIDE), dtype=np.uint8)
    for place in 1 + np.flatnonzero(rng.random(len(keys) - 1) < _SHARE):
        flips = functools.reduce(int.__xor__, (1 << int(bit) for bit in rng.integers(64, size=3)))
        hashes[place] = hashes[place - 1] ^ np.uint64(flips)
        small[place] = small[place - 1]
    kept = set(kept_places(batch))
    return batch | {
        PICTURE: rng.integers(1 << 62, size=len(keys)).tolist(),
        PIXELS: rng.integers(10_000, 1_000_000, size=len(keys)).tolist(),
        HASHES: [row.tobytes() if place in kept else b"" for place, row in enumerate(hashes)],
        SMALL: [row.tobytes() if place in kept else b"" for place, row in enumerate(small)],
    }


if __name__ == "__main__":
    main()
