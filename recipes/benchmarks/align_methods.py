"""Compare the methods of alignment, from the same English CLIPs: Korean R@10, the sources' English R@10, time, memory.

for seed in 0 1 2; do
  accelerate launch recipes/pretrain.py --config recipes/configs/pretrain/flickr8k_en_small.yaml \
    --output_dir runs/flickr8k_en_small_$seed --data.seed $seed --model.seed $seed --train.seed $seed
done
python recipes/benchmarks/align_methods.py                  # six methods, three seeds: an hour on one CPU core

Each run is recipes/align.py with a configuration of recipes/configs/align, in its own process, from the source with
the same seed. Minutes are for the whole run: loading, features of frozen towers, training, evaluation.
"""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from recipe_runs import RECIPES, Cost, number, start_once
from rich.console import Console
from rich.table import Table

METHODS = ("frozen", "distill", "two_stage", "anchor", "full", "lora")  # lora starts from the result of distill
RECALL = "{}/text_to_image/recall@10"


class Outcome(NamedTuple):
    """The result of one run."""

    korean: float  # text-to-image R@10 of all captions of the validation photos
    english: float
    cost: Cost


def main() -> None:
    """Run every method with every seed and print the table."""
    args = parser().parse_args()
    rows: dict[str, list[Outcome]] = {}
    english = [recall(Path(args.source.format(seed=seed)), "en") for seed in args.seeds]
    for method in args.methods:
        rows[method] = [align(method, seed, args) for seed in args.seeds]
        print_table({method: rows[method]}, english)
    print_table(rows, english)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    cli.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    cli.add_argument("--source", default="runs/flickr8k_en_small_{seed}", help="run directory (default: %(default)s)")
    cli.add_argument("--output_dir", default="runs/align_methods", help="of all runs (default: %(default)s)")
    cli.add_argument("options", nargs="*", help="further options of recipes/align.py, behind --")
    return cli


def align(method: str, seed: int, args: argparse.Namespace) -> Outcome:
    """Align the source of a seed by a method, or read the result of an earlier call."""
    run = Path(args.output_dir) / f"{method}-{seed}"
    source = Path(args.output_dir) / f"distill-{seed}" if method == "lora" else Path(args.source.format(seed=seed))
    config = RECIPES / "configs" / "align" / f"flickr8k_ko_{method}.yaml"
    words = ["--config", str(config), "--model.clip", str(source / "model"), *args.options]
    words += [word for key in ("data", "model", "train") for word in (f"--{key}.seed", str(seed))]
    cost = start_once(run, "align.py", *words)
    return Outcome(recall(run, "ko"), recall(run, "en"), cost)


def recall(run: Path, language: str) -> float:
    """Return R@10 of a finished run, in percent."""
    return 100 * number(run, RECALL.format(language)).value


def print_table(rows: dict[str, list[Outcome]], english: list[float]) -> None:
    """Print means over the seeds; the ratio is of the means, with each seed's ratio in brackets."""
    each = "/".join(f"{value:.1f}" for value in english)
    table = Table(title=f"Text to image, R@10, %. Sources, English: {statistics.fmean(english):.1f} ({each})")
    for heading in ("method", "Korean", "of the source's English", "English", "minutes", "CPU minutes", "peak GiB"):
        table.add_column(heading)
    for method, outcomes in rows.items():
        korean = [outcome.korean for outcome in outcomes]
        ratios = "/".join(f"{own / reference:.2f}" for own, reference in zip(korean, english, strict=True))
        mean = statistics.fmean(korean)
        others = zip(*((outcome.english, *outcome.cost) for outcome in outcomes), strict=True)
        table.add_row(
            method,
            f"{mean:.1f} ({'/'.join(f'{value:.1f}' for value in korean)})",
            f"{mean / statistics.fmean(english):.2f} ({ratios})",
            *(f"{statistics.fmean(column):.1f}" for column in others),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
