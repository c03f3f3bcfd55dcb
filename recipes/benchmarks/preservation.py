"""Draw what the weight of the preservation term does: the English that is kept, against the Korean that is lost.

accelerate launch recipes/pretrain.py --output_dir runs/scenes_en_0 --train.num_steps 1400 \
  --data.sources "[{path: scenes, scenes_size: 200000, languages: {en: 1.0}}]"
python recipes/benchmarks/preservation.py                   # four weights, three seeds, one source

Each run is recipes/align.py with the same configuration and another `distill.preserve`, in its own process. English is
compared with the source, Korean with the run of the same seed without preservation (weight 0), query by query, by
recipes/evaluate.py. All numbers are read from the files results.json of the runs and of these comparisons. Runs and
comparisons that exist are not repeated.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from matplotlib.figure import Figure
from recipe_runs import RECIPES, line, number, shown, start
from rich.console import Console
from rich.table import Table

from koclip.evaluation.report.charts import GREY, MORE_COLOURS, colour, korean_style, save
from koclip.metrics import Metric

KEPT, LOST = 0.98, 0.01  # shares: what should be kept of the source's English, and the Korean that it may cost


class Point(NamedTuple):
    """One run: its weight and seed, the Korean it has gained over weight 0, and the English it has kept."""

    weight: float
    seed: int
    korean: Metric  # difference of shares, paired
    english: Metric  # share of the source's number, paired


def main(words: Sequence[str] | None = None) -> None:
    """Run every weight with every seed, print the table and draw the curve."""
    args = parser().parse_args(words)
    points = []
    for seed in args.seeds:
        runs = {weight: align(weight, seed, args) for weight in sorted({0.0, *args.weights})}
        points += compare(runs, seed, args)
    print_table(points, args.metric)
    with korean_style():
        save(draw(points, args.metric), Path(args.output_dir) / "preservation.png")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    cli.add_argument("--weights", nargs="+", type=float, default=[0.0, 3.0, 10.0, 30.0])
    cli.add_argument("--source", default="runs/scenes_en_0/model", help="directory; {seed} is replaced (%(default)s)")
    cli.add_argument("--config", default=str(RECIPES / "configs" / "align" / "scenes_preserve.yaml"))
    cli.add_argument("--metric", default="text_to_image/recall@1", help="default: %(default)s")
    cli.add_argument("--output_dir", default="runs/preservation", help="of all runs (default: %(default)s)")
    cli.add_argument("options", nargs="*", help="further options of recipes/align.py, behind --")
    return cli


def align(weight: float, seed: int, args: argparse.Namespace) -> Path:
    """Align the source of a seed with a weight; return the run directory."""
    run = Path(args.output_dir) / f"{weight:g}-{seed}"
    if not (run / "results.json").exists():
        start("align.py", "--config", args.config, "--output_dir", str(run), "--distill.preserve", str(weight),
              "--model.clip", args.source.format(seed=seed), "--data.seed", str(seed), "--train.seed", str(seed),
              "--align.cache_dir", str(Path(args.output_dir) / f"features-{seed}"), *args.options)  # fmt: skip
    return run


def compare(runs: dict[float, Path], seed: int, args: argparse.Namespace) -> list[Point]:
    """Compare the runs of a seed with weight 0 and with the source."""
    folder = Path(args.output_dir) / f"compared-{'-'.join(f'{weight:g}' for weight in runs)}-{seed}"
    base, others = runs[0.0], {weight: run for weight, run in runs.items() if weight}
    config = yaml.safe_load((base / "config.yaml").read_text(encoding="utf-8"))
    labels = {weight: run.name if len(others) > 1 else "" for weight, run in others.items()}
    if not all((folder / label / "results.json").exists() for label in labels.values()):
        models = [str(run / "model") for run in others.values()]
        sets = line(config["eval"]["sets"])
        start("evaluate.py", "--source", str(base / "model"), "--models", *models, "--sets", sets,
              "--output_dir", str(folder), "--cache_dir", str(Path(args.output_dir) / "embeddings"))  # fmt: skip
    nothing = Metric(0.0, (0.0, 0.0), 0)
    korean = {weight: number(folder / label, f"ko/gain_{args.metric}") for weight, label in labels.items()}
    return [
        Point(weight, seed, korean.get(weight, nothing), number(run, f"en/kept_{args.metric}"))
        for weight, run in runs.items()
    ]


def means(points: Sequence[Point]) -> dict[float, tuple[float, float]]:
    """Return the means over seeds by weight: the Korean gained, and the English kept."""
    by_weight: dict[float, list[Point]] = {}
    for point in points:
        by_weight.setdefault(point.weight, []).append(point)
    return {
        weight: (
            statistics.fmean(point.korean.value for point in own),
            statistics.fmean(point.english.value for point in own),
        )
        for weight, own in by_weight.items()
    }


def print_table(points: Sequence[Point], metric: str) -> None:
    """Print each run with its paired intervals, and the means over seeds."""
    table = Table(title=f"{metric}: Korean minus weight 0, points; English kept of the source, %. 95 % intervals")
    for heading in ("weight", "seed", "Korean", "English kept"):
        table.add_column(heading, justify="right")
    for weight, (korean, english) in means(points).items():
        for point in (point for point in points if point.weight == weight):
            table.add_row(f"{weight:g}", str(point.seed), shown(point.korean, "+"), shown(point.english))
        table.add_row(f"{weight:g}", "mean", f"{100 * korean:+.1f}", f"{100 * english:.1f}", end_section=True)
    Console(width=100).print(table)


def draw(points: Sequence[Point], metric: str) -> Figure:
    """Draw each seed's curve with intervals, and the mean with the weights beside it."""
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    axis = figure.subplots()
    for place, seed in enumerate(dict.fromkeys(point.seed for point in points)):
        own = [point for point in points if point.seed == seed]
        shade = MORE_COLOURS[place % len(MORE_COLOURS)]
        across = [[100 * abs(point.korean.value - point.korean.ci95[side]) for point in own] for side in (0, 1)]
        upward = [[100 * abs(point.english.value - point.english.ci95[side]) for point in own] for side in (0, 1)]
        korean, english = [100 * point.korean.value for point in own], [100 * point.english.value for point in own]
        axis.errorbar(korean, english, upward, across, fmt="o-", color=shade, alpha=0.35, label=f"seed {seed}")
    mean = means(points)
    korean, english = ([100 * value for value in values] for values in zip(*mean.values(), strict=True))
    axis.plot(korean, english, "o-", color=colour("ko"), linewidth=2, label="mean of the seeds")
    for weight, right, up in zip(mean, korean, english, strict=True):
        axis.annotate(f"{weight:g}", (right, up), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axis.axhline(100 * KEPT, color=GREY, linestyle="--")
    axis.axvline(-100 * LOST, color=GREY, linestyle="--")
    axis.set(xlabel="Korean minus that of weight 0, points", ylabel="English kept of the source, %")
    axis.set_title(
        f"{metric} by the weight of distill.preserve; dashed: {100 * KEPT:g} % kept, {100 * LOST:g} point lost"
    )
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
