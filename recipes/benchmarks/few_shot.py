"""Few-shot classifiers against zero-shot: 1 to 16 images per class, three draws, Korean and English names, calibration.

python recipes/benchmarks/few_shot.py --models runs/real_projection/model --sets emoji scene6
python recipes/benchmarks/few_shot.py --models runs/real_projection/model --sets tiny_imagenet --shots 16 --draws 1

- emoji: 26 kinds of emoji; shots from Twemoji, tested on blob, a style without shots;
- scene6: six kinds of places; half of the images is tested, and shots come from the other half;
- tiny_imagenet: 160 classes, which an image tower trained on ImageNet has seen in training.

`--data` is a folder with emoji_dev.parquet, scene6_test.parquet and tiny_imagenet_{train,val}.parquet. Their label is
the column `subgroup` of emoji, else `key`.

The mean of the draws is compared with zero-shot image by image; the interval is a bootstrap over the test images.
Settings are chosen by cross-validation of the shots alone, with one image per class by the rule. `choice` is what
`koclip adapt` keeps. The calibration error is that of the first draw, before and after a temperature from the held-out
shots. `--coop` adds CoOp. The seconds are those of all methods and draws of a cell, without embedding.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recipe_runs import shown
from rich.console import Console
from rich.table import Table

import koclip
from koclip.classifiers import calibration
from koclip.classifiers.coop import Prompts
from koclip.classifiers.heads import Head, Shots
from koclip.classifiers.selection import Fitted, HeldOut, choose, fit, method
from koclip.config import EvalSetConfig, SourceConfig
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks.probe import draw_shots
from koclip.evaluation.tasks.zero_shot import classifier, ensemble
from koclip.metrics import Metric, mean
from koclip.text.classes import load_classes

SHOTS, DRAWS, SEED = (1, 2, 4, 8, 16), 3, 0
METHODS = ("linear", "tip_adapter", "tip_adapter_f")
HALF = 20  # images of each class of scene6 that shots are drawn from
SCENE6 = {  # keys, Korean and English names
    "buildings": ("건물", "buildings"),
    "forests": ("숲", "forest"),
    "glacier": ("빙하", "glacier"),
    "mountains": ("산", "mountains"),
    "sea": ("바다", "sea"),
    "street": ("거리", "street"),
}
ALLOWED = -0.005  # of accuracy: no interval may lie wholly below


class Cell(NamedTuple):
    """One line of the table."""

    model: str
    set: str
    language: str
    shots: int
    method: str
    zero_shot: float
    gain: Metric
    errors: tuple[float, float] | None
    seconds: float


class Pool(NamedTuple):
    """What a cell is measured with."""

    name: str
    shots: Shots
    test: Shots
    texts: torch.Tensor
    prompts: Prompts | None


def source(file: Path, label: str, **where: list[str]) -> SourceConfig:
    """Return a table with a column of labels."""
    return SourceConfig(path=str(file), label=label, captions={}, where=where or None)


def set_of(name: str, data: Path, work: Path) -> EvalSet:
    """Open a set."""
    options: dict[str, Any] = {"tasks": ["few_shot", "zero_shot"], "templates": {"ko": "ko", "en": "en"}}
    if name == "emoji":
        file, kinds = data / "emoji_dev.parquet", [each.key for each in load_classes("emoji_kinds")]
        shots, test = (source(file, "subgroup", vendor=[style], subgroup=kinds) for style in ("twemoji", "blob"))
        options |= {"classes": "emoji_kinds", "template_kind": "drawing", "train": shots}
    elif name == "scene6":
        test, names = source(data / "scene6_test.parquet", "key"), work / "scene6.yaml"
        rows = [f"- {{key: {key}, ko: {korean}, en: {english}}}\n" for key, (korean, english) in SCENE6.items()]
        names.write_text("".join(rows), encoding="utf-8")
        options |= {"classes": str(names)}
    else:
        test, shots = (source(data / f"tiny_imagenet_{part}.parquet", "key") for part in ("val", "train"))
        options |= {"classes": "tiny_imagenet", "present_classes": True, "train": shots}
    return open_set(EvalSetConfig(source=test, **options))


def pools(embedder: Embedder, opened: EvalSet, coop: bool) -> Iterator[tuple[str, Pool]]:
    """Yield a pool for each language."""
    test = Shots(embedder.images(opened.images), torch.tensor(opened.labels))
    if opened.train is None:
        places, others = draw_shots(test.labels.numpy(), HALF, len(test.labels), SEED)
        shots, test = test.of(torch.from_numpy(places)), test.of(torch.from_numpy(others))
    else:
        shots = Shots(embedder.images(opened.train.images), torch.tensor(opened.train.labels))
    for language in opened.languages:
        names = [name.text(language) for name in opened.classes]
        texts = ensemble(classifier(embedder, names, opened.templates(language))) * embedder.encoder.scale
        prompts = Prompts.of(embedder.encoder, names, language) if coop else None
        yield language, Pool(opened.name, shots, test, texts, prompts)


def cells(pool: Pool, count: int, draws: int) -> Iterator[tuple[str, float, Metric, tuple[float, float] | None]]:
    """Yield method, zero-shot accuracy, gain, and calibration errors for a number of shots."""
    names = ("zero_shot", *METHODS, *(["coop"] if pool.prompts else []))
    hits: dict[str, list[torch.Tensor]] = {}
    errors: dict[str, tuple[float, float]] = {}
    for draw in range(draws):
        places, _ = draw_shots(pool.shots.labels.numpy(), count, 0, seed=DRAWS * SEED + draw)
        own = pool.shots.of(torch.from_numpy(places))
        fits: list[Fitted] = [fit(method(name, pool.prompts), pool.texts, own) for name in names]
        kept = choose(fits)
        for name, fitted in zip((*names, "choice"), (*fits, kept), strict=True):
            tested = logits_of(fitted.head, pool.test)
            hits.setdefault(name, []).append(tested.hits.double())
            value = calibration.temperature(fitted.held_out)
            if draw == 0:
                errors[name] = (calibration.error(tested).value, calibration.error(tested, value).value)
    plain = torch.stack(hits["zero_shot"]).mean(dim=0)
    for name, own_hits in hits.items():
        yield name, float(plain.mean()), mean(torch.stack(own_hits).mean(dim=0) - plain), errors.get(name)


def logits_of(head: Head, test: Shots) -> HeldOut:
    """Return the logits of the test images."""
    return HeldOut(head.logits(test.images), test.labels)


def measure(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield every cell."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for spec in options.models:
        embedder = Embedder(koclip.load(spec), options.batch_size, options.output_dir / "embeddings")
        for name in options.sets:
            opened = set_of(name, options.data, options.output_dir)
            for language, pool in pools(embedder, opened, options.coop):
                for count in options.shots:
                    began = time.monotonic()
                    lines = list(cells(pool, count, options.draws))
                    seconds = time.monotonic() - began
                    for own, zero_shot, gain, errors in lines:
                        yield Cell(spec, name, language, count, own, zero_shot, gain, errors, seconds)


def show(lines: list[Cell]) -> None:
    """Print the table and what the bars ask."""
    table = Table(title="Gain over zero-shot, points, mean of the draws with its 95 % interval")
    for name in ("set", "names", "shots", "method", "zero-shot, %", "gain", "error before, %", "after, %", "seconds"):
        table.add_column(name)
    for line in lines:
        errors = [f"{100 * error:.1f}" for error in line.errors or ()] or ["-", "-"]
        start = [line.set, line.language, str(line.shots), line.method, f"{100 * line.zero_shot:.1f}"]
        table.add_row(*start, shown(line.gain, "+"), *errors, f"{line.seconds:.0f}")
    Console(width=140).print(table)
    own = [line for line in lines if line.method != "zero_shot"]
    below = [line for line in own if line.gain.ci95[1] < ALLOWED]
    several = [line.gain.value for line in own if line.shots > 1]
    print(f"{len(own)} cells, {len(below)} wholly below zero-shot by more than half a point: {below[:3]}")
    if several:
        print(f"mean gain from 2 shots on: {100 * np.mean(several):+.2f} points; lowest cell {100 * min(several):+.2f}")


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", required=True)
    options.add_argument("--data", type=Path, default=Path("data"), help="folder of the tables")
    options.add_argument("--sets", nargs="+", default=["emoji", "scene6"], choices=["emoji", "scene6", "tiny_imagenet"])
    options.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    options.add_argument("--draws", type=int, default=DRAWS)
    options.add_argument("--coop", action="store_true", help="CoOp too: minutes for each cell")
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--output_dir", type=Path, default=Path("runs/few_shot"))
    return options


def main() -> None:
    """Run all cells and print them."""
    options = parser().parse_args()
    lines = list(measure(options))
    rows = [line._replace(gain=line.gain.to_dict())._asdict() for line in lines]  # type: ignore[arg-type]
    (options.output_dir / "few_shot.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(lines)


if __name__ == "__main__":
    main()
