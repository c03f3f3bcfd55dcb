"""Does a model that is aligned with Korean captions alone answer English, and why? One configuration, three factors.

koclip data flickr8k_ko --accept_terms flickr8k_ko
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain/flickr8k_en_small.yaml \
  --output_dir runs/flickr8k_en_small_0
python recipes/benchmarks/masked_lm.py korean/*.txt --output_dir runs/korean_encoder     # any Korean text files
python recipes/benchmarks/cross_lingual.py                  # ten runs

Each run is recipes/align.py with the configuration cross_lingual, in its own process, with another text encoder, image
tower or number of steps. Runs with the same tower share its features. All numbers are read from the files results.json
of the runs. Runs that exist are not repeated; --runs selects some.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from matplotlib.figure import Figure
from recipe_runs import RECIPES, number, results_of, shown, start_once
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoTokenizer

from koclip import storage
from koclip.config import SourceConfig
from koclip.data.sources import open_source
from koclip.data.transforms import PIXEL_LIMIT, decode
from koclip.evaluation.report.charts import GREY, colour, korean_style, percents, save, whiskers
from koclip.metrics import Metric
from koclip.models.pretrained import load_image_side, load_text_encoder

K = 10
METRIC = f"text_to_image/recall@{K}"
PHOTOS, PART = 256, 64  # photos for the statistics of a random image tower, and those at a time


class Run(NamedTuple):
    """The text encoder, the image tower and the number of steps of a run."""

    text: str
    image: str
    steps: int

    @property
    def name(self) -> str:
        """The name of its directory, and in --runs."""
        return f"{self.text}-{self.image}-{self.steps}"


BASE = Run("multilingual", "imagenet", 700)
RUNS = (
    *(BASE._replace(steps=steps) for steps in (100, 300, 700, 1_500)),
    *(BASE._replace(text=text) for text in ("korean", "korean_random", "random")),
    *(BASE._replace(image=image) for image in ("clip", "random")),
    Run("random", "random", BASE.steps),
)


class Outcome(NamedTuple):
    """The numbers of a run."""

    run: Run
    korean: Metric
    english: Metric
    chance: float  # of a random order of the images


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table and draw the picture."""
    args = parser().parse_args(words)
    outcomes = [measure(run, args) for run in RUNS if run.name in args.runs]
    print_table(outcomes)
    with korean_style():
        save(draw(outcomes), Path(args.output_dir) / "cross_lingual.png")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [run.name for run in RUNS]
    cli.add_argument("--runs", nargs="+", choices=names, default=names, metavar="RUN", help="default: all")
    texts, images = cli.add_argument_group("text encoders"), cli.add_argument_group("image towers")
    texts.add_argument("--multilingual", default="intfloat/multilingual-e5-small", help="default: %(default)s")
    texts.add_argument("--korean", default="runs/korean_encoder", help="of masked_lm.py (default: %(default)s)")
    images.add_argument("--imagenet", default="timm/tf_efficientnet_lite0.in1k", help="default: %(default)s")
    images.add_argument("--clip", default="runs/flickr8k_en_small_0/model", help="default: %(default)s")
    cli.add_argument("--config", default=str(RECIPES / "configs" / "align" / "cross_lingual.yaml"))
    cli.add_argument("--output_dir", default="runs/cross_lingual", help="of all runs (default: %(default)s)")
    cli.add_argument("options", nargs="*", help="further options of recipes/align.py, behind --")
    return cli


def measure(run: Run, args: argparse.Namespace) -> Outcome:
    """Align the towers of a run, unless that is done; return its numbers."""
    folder = Path(args.output_dir) / run.name
    start_once(folder, "align.py", "--config", args.config, "--model.clip", image_tower(run, args),
               "--model.text_encoder", text_encoder(run, args), "--align.cache_dir", str(features(run, args)),
               "--train.num_steps", str(run.steps), *args.options)  # fmt: skip
    images = sum(data["images"] for data in results_of(folder)["data"].values())
    return Outcome(run, number(folder, f"ko/{METRIC}"), number(folder, f"en/{METRIC}"), K / images)


def text_encoder(run: Run, args: argparse.Namespace) -> str:
    """Return `model.text_encoder`. A random encoder is built if it does not exist."""
    sources = {"random": args.multilingual, "korean_random": args.korean}
    if run.text not in sources:
        return str(getattr(args, run.text))
    folder = Path(args.output_dir) / f"{run.text}_encoder"
    if not folder.exists():
        save_random_encoder(sources[run.text], folder)
    return str(folder)


def image_tower(run: Run, args: argparse.Namespace) -> str:
    """Return `model.clip`. The random tower is built if it does not exist."""
    if run.image != "random":
        return str(getattr(args, run.image))
    folder = Path(args.output_dir) / "random_tower"
    if not folder.exists():
        config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        save_random_tower(args.imagenet, SourceConfig(**config["data"]["sources"][0]), folder)
    return str(folder)


def save_random_encoder(path: str, folder: Path) -> None:
    """Save a text encoder with the architecture of `path` and random weights, and the tokenizer of `path`."""
    encoder, tokenizer = load_text_encoder(f"auto:{path}"), AutoTokenizer.from_pretrained(path)
    with storage.atomic(folder) as partial:
        encoder.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


@torch.no_grad()
def save_random_tower(path: str, source: SourceConfig, folder: Path) -> None:
    """Save an image tower with the architecture of `path` and random weights.

    Its batch norms get the statistics of training photos. Without them, the outputs of a deep random network are 0.
    """
    pretrained, processor = load_image_side(path)
    torch.manual_seed(0)
    tower = AutoModel.from_config(pretrained.config).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all parts
            module.reset_running_stats()
    rows = [row for row, _ in zip(open_source(source).iter_rows(), range(PHOTOS), strict=False)]
    for place in range(0, len(rows), PART):
        photos = [decode(row.image, *PIXEL_LIMIT) for row in rows[place : place + PART]]
        tower(**processor(photos, return_tensors="pt"))
    with storage.atomic(folder) as partial:
        tower.save_pretrained(partial)
        processor.save_pretrained(partial)


def features(run: Run, args: argparse.Namespace) -> Path:
    """Return the directory of the features of a pair of towers. Pairs share the folders of each tower by links."""
    folder = Path(args.output_dir) / "features"
    pair = folder / f"{run.text}-{run.image}"
    pair.mkdir(parents=True, exist_ok=True)
    for link, tower in (("images", f"images-{run.image}"), ("texts-ko", f"texts-{run.text}")):
        (folder / tower).mkdir(exist_ok=True)
        if not (pair / link).is_symlink():
            (pair / link).symlink_to(Path("..") / tower, target_is_directory=True)
    return pair


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print each run with its intervals."""
    table = Table(title=f"Trained on Korean captions alone; text to image, R@{K}, %, with 95 % intervals")
    for heading in ("text encoder", "image tower", "steps", "Korean", "English", "chance"):
        table.add_column(heading)
    for run, korean, english, chance in outcomes:
        numbers = shown(korean), shown(english), f"{100 * chance:.1f}"
        table.add_row(run.text, run.image, f"{run.steps:,}", *numbers)
    Console(width=100).print(table)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Draw two bars for each run, with intervals, and the line of chance."""
    figure = Figure(figsize=(7.6, 0.55 * len(outcomes) + 1.4), layout="constrained")
    axis = figure.subplots()
    for language, shift in (("ko", -0.19), ("en", 0.19)):
        metrics = [outcome.korean if language == "ko" else outcome.english for outcome in outcomes]
        places = [place + shift for place in range(len(outcomes))]
        axis.barh(places, percents(metrics), 0.36, color=colour(language), label=language)
        axis.errorbar(percents(metrics), places, xerr=whiskers(metrics), fmt="none", ecolor="black", capsize=2)
    axis.axvline(100 * outcomes[0].chance, color="black", linestyle=":", label="chance")
    labels = [f"{run.text} · {run.image} · {run.steps:,}" for run in (outcome.run for outcome in outcomes)]
    axis.set_yticks(range(len(outcomes)), labels)
    axis.invert_yaxis()
    axis.grid(axis="x", color=GREY, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_xlabel(f"text to image, R@{K}, %")
    axis.set_title("Trained on Korean captions alone: text encoder · image tower · steps")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
