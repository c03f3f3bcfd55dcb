"""Which method for how many photos? Korean R@10, CPU minutes and memory of each method at each number of photos.

koclip data flickr8k_ko
python recipes/benchmarks/which_way.py                      # all cells: hours on one CPU core; `--sizes`, `--methods`
python recipes/benchmarks/which_way.py --methods            # no run: the table and the picture of the runs that exist

Towers: EfficientNet-Lite0 and multilingual-e5-small. A cell is one run of recipes/pretrain.py or recipes/align.py in
its own process, then one of recipes/evaluate.py. Photos are chosen by a hash of their content, so a smaller set is part
of a larger set. Each photo has five captions. Steps are passes x photos / batch size, but at least 100; a tenth of them
warms up. There are 60 passes where a step is cheap (scratch, projection), 6 where texts pass through the text encoder.
Learning rates are those of the configurations in recipes/configs; nothing is tuned.

- scratch: configs/pretrain/flickr8k_ko_small, on Korean captions;
- projection: configs/align/real_projection, a linear map between the frozen towers;
- top_layers, lora, frozen: start from the model of `projection`, then train the top two layers of the text encoder,
  adapters, or all its layers without the token embeddings;
- two_stage: a projection of the English captions of the same photos is the source and the teacher. A new text encoder
  learns from the teacher, then from the photos. It computes the features that it needs itself.

The features of the frozen towers are computed once for all methods, size after size. Their cost at a size is the sum of
the costs up to this size. With `--features` they exist, and their cost is not measured. Evaluation is not in the costs.
Cells that exist are not repeated.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from recipe_runs import COST, RECIPES, cost_of, line, number, start_once
from rich.console import Console
from rich.table import Table

from koclip.evaluation.report.charts import COLOURS, MORE_COLOURS, OTHER_COLOUR, korean_style, save
from koclip.metrics import Metric

SIZES = (300, 1_000, 3_000, 6_000)  # photos; the last: all
LEAST_STEPS = 100
RECALL = "ko/text_to_image/recall@10"
SAME = {"model.text_encoder": "same", "model.pooling": "null"}
TUNED = {"train.batch_size": "128", "optim.lr": "5.0e-5"}  # the rate of configs/align/klue_roberta_base_frozen


class Way(NamedTuple):
    """A method: a configuration, and the options that it changes."""

    config: str  # in recipes/configs
    passes: int  # over the photos
    features: tuple[str, ...] = ()  # kinds of features of frozen towers that it reads
    options: Mapping[str, str] = MappingProxyType({})
    source: str | None = None  # the method whose model it starts from
    language: str = "ko"  # of the captions


WAYS = {
    "scratch": Way("pretrain/flickr8k_ko_small", 60),
    "projection": Way("align/real_projection", 60, ("images", "ko")),
    "top_layers": Way(
        "align/real_projection",
        6,
        ("images",),
        {**SAME, **TUNED, "align.method": "frozen_image", "align.text_layers": "2"},
        "projection",
    ),
    "lora": Way(
        "align/real_projection",
        6,
        ("images",),
        {**SAME, **TUNED, "align.method": "lora", "optim.lr": "2.0e-4"},  # the rate of configs/align/xlmr_base_lora
        "projection",
    ),
    "frozen": Way(
        "align/real_projection",
        6,
        ("images",),
        {**SAME, **TUNED, "align.method": "frozen_image", "align.freeze_embeddings": "true"},
        "projection",
    ),
    "two_stage": Way(
        "align/real_projection",
        6,
        (),
        {**TUNED, "align.method": "two_stage", "align.second_lr": "2.0e-5", "distill.anchor": "0.5"},
        "english",
    ),
    "english": Way("align/real_projection", 60, ("images", "en"), language="en"),
}
METHODS = tuple(name for name in WAYS if name != "english")


class Cell(NamedTuple):
    """A method at a number of photos."""

    method: str
    photos: int

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{self.method}-{self.photos}"

    @property
    def way(self) -> Way:
        """Its method."""
        return WAYS[self.method]

    @property
    def source(self) -> "Cell | None":
        """The cell whose model it starts from."""
        return self._replace(method=self.way.source) if self.way.source else None

    @property
    def steps(self) -> int:
        """Its number of steps, by the rule above; of each stage if there are two."""
        batch_size = int(self.way.options.get("train.batch_size", _config(self.way)["train"]["batch_size"]))
        return max(LEAST_STEPS, round(self.way.passes * self.photos / batch_size))


class Outcome(NamedTuple):
    """The result of a cell."""

    recall: Metric
    training: float  # CPU minutes, with the source's
    features: float | None  # CPU minutes; None: not measured
    gib: float  # peak memory of the training process


def main(words: Sequence[str] | None = None) -> None:
    """Run the chosen cells, then print the table and draw the picture of all cells that exist."""
    args = parser().parse_args(words)
    for photos in sorted(args.sizes):
        for method in args.methods:
            run(Cell(method, photos), args)
    folder = Path(args.output_dir)
    outcomes = {cell: outcome(cell, folder) for cell in cells() if (folder / cell.name / "results").exists()}
    print_table(outcomes)
    if outcomes:
        with korean_style():
            save(draw(outcomes), folder / "which_way.png")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cli.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES), help="photos")
    cli.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    cli.add_argument("--clip", default="timm/tf_efficientnet_lite0.in1k", help="Hub id or directory (%(default)s)")
    cli.add_argument("--text_encoder", default="intfloat/multilingual-e5-small", help="the same (%(default)s)")
    cli.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training (default: %(default)s)")
    cli.add_argument("--features", help="cache_dir with features that exist (default: computed and measured)")
    cli.add_argument("--output_dir", default="runs/which_way", help="of all runs (default: %(default)s)")
    return cli


def cells() -> Iterator[Cell]:
    """Yield all cells of the table."""
    for photos in SIZES:
        yield from (Cell(method, photos) for method in METHODS)


def run(cell: Cell, args: argparse.Namespace) -> None:
    """Run a cell: first the cell that it starts from and the features that it needs, then training, then evaluation."""
    folder = Path(args.output_dir) / cell.name
    if cell.source:
        train(cell.source, args)
    train(cell, args)
    if not (folder / "results" / COST).exists():
        captioned = _source(cell, "val") | {"captions": {"ko": "captions_ko"}}
        sets = [{"source": {name: captioned[name] for name in ("path", "name", "captions")}}]
        cache = str(Path(args.output_dir) / "embeddings")
        start_once(folder / "results", "evaluate.py", "--model", str(folder / "model"), "--sets", line(sets),
                   "--cache_dir", cache)  # fmt: skip


def train(cell: Cell, args: argparse.Namespace) -> None:
    """Train the model of a cell; delete its checkpoints."""
    for kind in () if args.features else cell.way.features:
        for photos in SIZES[: SIZES.index(cell.photos) + 1]:
            compute_features(kind, photos, args)
    steps, options = cell.steps, dict(cell.way.options)
    total = 2 * steps if cell.method == "two_stage" else steps
    if total > steps:
        options["align.first_steps"] = str(steps)
    words = _words(cell, args, total, options)
    start_once(Path(args.output_dir) / cell.name, *words)
    shutil.rmtree(Path(args.output_dir) / cell.name / "checkpoints", ignore_errors=True)


def compute_features(kind: str, photos: int, args: argparse.Namespace) -> None:
    """Compute the features of the images, or of the captions in a language, by a run of one step; keep its cost."""
    folder = Path(args.output_dir) / f"features-{kind}-{photos}"
    if (folder / COST).exists():
        return
    cell = Cell("projection" if kind == "images" else {"ko": "projection", "en": "english"}[kind], photos)
    options = {"train.batch_size": "2"} | ({"align.method": "frozen_image"} if kind == "images" else {})
    with tempfile.TemporaryDirectory() as name:
        start_once(Path(name) / "run", *_words(cell, args, 1, options))
        folder.mkdir(parents=True)
        shutil.copy(Path(name) / "run" / COST, folder)


def outcome(cell: Cell, folder: Path) -> Outcome:
    """Return the result of a cell that has been run."""
    chain = [cell, *([cell.source] if cell.source else [])]
    kinds = {kind for part in chain for kind in part.way.features}
    sizes = SIZES[: SIZES.index(cell.photos) + 1]
    costs = [folder / f"features-{kind}-{photos}" for kind in kinds for photos in sizes]
    measured = all((path / COST).exists() for path in costs)
    features = sum(cost_of(path).cpu_minutes for path in costs) if measured else None
    training = sum(cost_of(folder / part.name).cpu_minutes for part in chain)
    return Outcome(number(folder / cell.name / "results", RECALL), training, features, cost_of(folder / cell.name).gib)


def print_table(outcomes: dict[Cell, Outcome]) -> None:
    """Print the table; cells that were not run say so."""
    table = Table(title="Korean text to image, R@10, % (95 % interval). CPU minutes: training, features, both")
    for heading in ("photos", "method", "steps", "R@10", "training", "features", "both", "peak GiB"):
        table.add_column(heading, justify="right")
    for cell in cells():
        row = [f"{cell.photos:,}", cell.method, f"{cell.steps:,}"]
        if (result := outcomes.get(cell)) is None:
            table.add_row(*row, "not run", end_section=cell.method == METHODS[-1])
            continue
        low, high = result.recall.ci95
        row.append(f"{100 * result.recall.value:.1f} ({100 * low:.1f}-{100 * high:.1f})")
        both = None if result.features is None else result.training + result.features
        costs = result.training, result.features, both, result.gib
        shown = ("-" if cost is None else f"{cost:.1f}" for cost in costs)
        table.add_row(*row, *shown, end_section=cell.method == METHODS[-1])
    Console(width=110).print(table)


def draw(outcomes: dict[Cell, Outcome]) -> Figure:
    """Draw R@10 against the number of photos, a line for each method."""
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    axis = figure.subplots()
    shades = (COLOURS["en"], COLOURS["ko"], OTHER_COLOUR, *MORE_COLOURS)
    for method, shade in zip(METHODS, shades, strict=False):
        own = {cell.photos: result.recall for cell, result in outcomes.items() if cell.method == method}
        if own:
            values = [100 * recall.value for recall in own.values()]
            errors = [[100 * abs(recall.value - recall.ci95[side]) for recall in own.values()] for side in (0, 1)]
            axis.errorbar(list(own), values, errors, fmt="o-", color=shade, label=method, capsize=2)
    axis.set(xscale="log", xlabel="photos, five captions each", ylabel="Korean text to image, R@10, %", ylim=(0, None))
    axis.set_xticks(SIZES, [f"{photos:,}" for photos in SIZES])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


def _words(cell: Cell, args: argparse.Namespace, steps: int, options: dict[str, str]) -> list[str]:
    """Return the recipe and its options."""
    words = {
        "config": str(RECIPES / "configs" / f"{cell.way.config}.yaml"),
        "data.sources": line([_source(cell)]),
        "eval.sets": "[]",
        "train.num_steps": str(steps),
        "train.precision": args.precision,
        "train.eval_every": "0",
        "optim.warmup_steps": str(steps // 10 if "align.first_steps" not in options else steps // 20),
    }
    recipe = cell.way.config.split("/")[0]
    if recipe == "align":
        source = str(Path(args.output_dir) / cell.source.name / "model") if cell.source else args.clip
        words |= {"model.clip": source, "model.text_encoder": args.text_encoder, "align.compare_source": "false"}
        if cell.method != "two_stage":  # each has its own teacher
            words["align.cache_dir"] = args.features or str(Path(args.output_dir) / "features")
    return [f"{recipe}.py", *(word for name, value in (words | options).items() for word in (f"--{name}", value))]


def _source(cell: Cell, split: str = "train") -> dict[str, Any]:
    """Return the data source of a cell."""
    source: dict[str, Any] = dict(_config(WAYS["projection"])["data"]["sources"][0])
    source["path"] = str(Path(source["path"]).with_name(f"{split}.parquet"))
    source["languages"] = {cell.way.language: 1.0}
    return source | ({} if cell.photos == SIZES[-1] else {"image_range": [0.0, cell.photos / SIZES[-1]]})


def _config(way: Way) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((RECIPES / "configs" / f"{way.config}.yaml").read_text(encoding="utf-8"))
    return config


if __name__ == "__main__":
    main()
