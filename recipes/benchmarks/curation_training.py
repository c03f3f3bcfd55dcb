"""Is a model better if wrong pairs are dropped before training? A share of the photos gets the captions of others.

koclip data flickr8k_ko
koclip align --config align/real_projection --output_dir runs/scorer --align.cache_dir runs/features/scorer \
  --data.sources "[{path: data/flickr8k_ko/train.parquet, split: 'train[:2000]', captions: {ko: captions_ko}}]" \
  --train.num_steps 250 --eval.sets "[]"
python recipes/benchmarks/curation_training.py --scorer runs/scorer/model

The pairs are 4,000 photos that the scorer has not seen, with their Korean captions. 30 % of them exchange their
captions with each other. `koclip curate` drops the 30 % with the lowest scores. align/real_projection is trained on the
noisy pairs and on the cleaned pairs, with the same number of steps. The models are compared query by query, on 1,000
other photos, by recipes/evaluate.py. Runs that exist are not repeated.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from curation_scores import exchanged
from pairs import FLICKR8K_KO
from recipe_runs import RECIPES, line, number, shown, start_once
from rich.console import Console
from rich.table import Table

from koclip import storage
from koclip.config import SourceConfig
from koclip.curation.report import DROPPED
from koclip.curation.scores import LOW
from koclip.data.sources import open_source
from koclip.data.transforms import read
from koclip.text.normalize import usable

RECALL = "text_to_image/recall@10"
NOISY, CLEANED = "noisy", "cleaned"


def main(words: Sequence[str] | None = None) -> None:
    """Clean the pairs, train on each set with each seed, and print the comparisons."""
    args = parser().parse_args(words)
    folder = Path(args.output_dir)
    paths = {NOISY: folder / "noisy.parquet", CLEANED: clean(folder, args)}
    print_dropped(folder)
    table = Table(title="Korean text to image, R@10, %, and the gain over the noisy pairs, points. 95 % intervals")
    for heading in ("pairs", "seed", "R@10", "gain"):
        table.add_column(heading, justify="right")
    gains = []
    for seed in args.seeds:
        compared = compare({name: train(name, path, seed, args) for name, path in paths.items()}, seed, args)
        gains.append(number(compared, f"ko/gain_{RECALL}"))
        table.add_row(NOISY, str(seed), shown(number(compared, f"ko/source_{RECALL}")), "")
        table.add_row(CLEANED, str(seed), shown(number(compared, f"ko/{RECALL}")), shown(gains[-1], "+"))
    table.add_row(CLEANED, "mean", "", f"{100 * statistics.fmean(gain.value for gain in gains):+.1f}")
    Console(width=100).print(table)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("--scorer", default="runs/scorer/model", help="a spec of koclip.load (default: %(default)s)")
    cli.add_argument("--data", default=str(FLICKR8K_KO), help="table of the pairs (default: %(default)s)")
    cli.add_argument("--split", default="train[2000:6000]", help="rows of the table (default: %(default)s)")
    cli.add_argument("--share", type=float, default=0.3, help="of the rows that exchange their captions")
    cli.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    cli.add_argument("--steps", type=int, default=467, help="of each run: 60 passes over the noisy pairs")
    cli.add_argument("--clip", default="timm/tf_efficientnet_lite0.in1k", help="Hub id or directory (%(default)s)")
    cli.add_argument("--text_encoder", default="intfloat/multilingual-e5-small", help="the same (%(default)s)")
    cli.add_argument("--features", help="cache_dir with features that exist (default: in output_dir)")
    cli.add_argument("--output_dir", default="runs/curation_training", help="of all runs (default: %(default)s)")
    cli.add_argument("options", nargs="*", help="further options of recipes/align.py, behind --")
    return cli


def clean(folder: Path, args: argparse.Namespace) -> Path:
    """Write the noisy pairs, and curate them; return the files of the result."""
    if not (folder / "noisy.parquet").exists():
        source = SourceConfig(path=args.data, split=args.split, captions={"ko": "captions_ko"})
        rows = list(open_source(source).iter_rows())
        captions, wrong = exchanged([usable(row.captions["ko"]) for row in rows], args.share, seed=0)
        images = [{"bytes": read(row.image), "path": row.key.rpartition("/")[2]} for row in rows]
        pairs = pa.table({"image": images, "captions_ko": captions, "wrong": wrong})
        with storage.atomic(folder / "noisy.parquet") as partial:
            pq.write_table(pairs, partial)
    start_once(folder / "cleaned", "curate.py", "--sources", line([pairs_in(folder / "noisy.parquet")]),
               "--pairs.model", args.scorer, "--pairs.drop_share", str(args.share))  # fmt: skip
    return folder / "cleaned" / "*.parquet"


def print_dropped(folder: Path) -> None:
    """Print how many rows were dropped for their score, and how many of them are wrong pairs."""
    lines = (folder / "cleaned" / DROPPED).read_text(encoding="utf-8").splitlines()
    dropped = [row["key"] for row in map(json.loads, lines) if row["reason"] == LOW]
    wrong = pq.read_table(folder / "noisy.parquet", columns=["wrong"])["wrong"].to_pylist()
    right = sum(wrong[int(key.split("/")[1])] for key in dropped)
    print(
        f"{len(wrong):,} rows, {sum(wrong):,} wrong; {len(dropped):,} dropped for their score, {right:,} of them wrong"
    )


def train(name: str, path: Path, seed: int, args: argparse.Namespace) -> Path:
    """Train on a set of pairs; return the run's directory."""
    run = Path(args.output_dir) / f"{name}-{seed}"
    features = args.features or str(Path(args.output_dir) / "features")
    config = str(RECIPES / "configs" / "align" / "real_projection.yaml")
    start_once(run, "align.py", "--config", config, "--model.clip", args.clip, "--model.text_encoder",
               args.text_encoder, "--data.sources", line([pairs_in(path)]), "--train.num_steps", str(args.steps),
               "--train.seed", str(seed), "--data.seed", str(seed), "--align.cache_dir", features, "--eval.sets", "[]",
               *args.options)  # fmt: skip
    return run


def compare(runs: dict[str, Path], seed: int, args: argparse.Namespace) -> Path:
    """Evaluate the runs of a seed, and compare them query by query; return the directory."""
    folder = Path(args.output_dir) / f"compared-{seed}"
    sets = [{"source": pairs_in(Path(args.data).with_name("val.parquet"))}]
    start_once(folder, "evaluate.py", "--source", str(runs[NOISY] / "model"), "--model", str(runs[CLEANED] / "model"),
               "--sets", line(sets), "--cache_dir", str(Path(args.output_dir) / "embeddings"))  # fmt: skip
    return folder


def pairs_in(path: Path) -> dict[str, Any]:
    """Return the settings of a table of pairs."""
    return {"path": str(path), "name": "flickr8k_ko", "captions": {"ko": "captions_ko"}}


if __name__ == "__main__":
    main()
