"""The directory of an evaluation, and what its results.json says of the data beside the numbers.

`data.<set>` of results.json holds: `source`, the configuration; `rows` read, of which `skipped` were left out, and
`images` measured, fewer than rows where rows of equal images are merged; `cut` where `max_images` left rows unread;
`parts`, the same of train, shifted sets and gallery; `captions` by language, equal ones too; `pairs`, of the task
`languages`: how many captions are `compared`, in how many `images` of how many, and how many without a counterpart are
`left_out`; `classes`, `absent_classes` that were left out, and `labels`, how they are named; `trained_on`, how many
`images` of all that are tested (`of`) the model was trained on, null where nothing is known, and of which models it is
not known (`unknown`).
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from koclip import distributed, storage
from koclip.config import ConfigError, EvaluateConfig, dump, to_dict
from koclip.evaluation.sets import EvalSet
from koclip.storage import environment
from koclip.training import pictures

Facts = Mapping[str, Any]


def processes(config: EvaluateConfig) -> Accelerator:
    """Return the accelerator that makes the processes of a launch one group.

    Raises:
        ConfigError: several processes were launched and do not form a group. On a CPU torchrun needs
            ACCELERATE_USE_CPU=true: without it each of them would silently evaluate everything.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched and do not find each other; on CPUs launch with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched}`"
        )
    return accelerator


def start(config: EvaluateConfig, eval_sets: Sequence[EvalSet]) -> Path:
    """Return the run directory, the same on every process; config.yaml and skipped.jsonl are in it."""
    name = config.output_dir or f"runs/evaluate-{datetime.now():%Y%m%d-%H%M%S}"
    run = Path(distributed.gather_objects(name)[0])
    if distributed.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        dump(config, run / "config.yaml")
        skipped = [skip._asdict() for eval_set in eval_sets for skip in eval_set.all_skipped()]
        (run / "skipped.jsonl").unlink(missing_ok=True)
        if skipped:
            storage.append_lines(run / "skipped.jsonl", skipped)
    distributed.barrier()
    return run


def surroundings() -> dict[str, Any]:
    """Return what the numbers depend on besides model and data; the number of processes is not among it."""
    return {name: value for name, value in environment().items() if name != "num_processes"}


def folders_of(run: Path, models: Sequence[str]) -> dict[str, Path]:
    """Return where each model's results go: the run directory, or of several models a directory each in it."""
    labels = labels_of(models)
    return {model: run / labels[model] if len(models) > 1 else run for model in models}


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model: a for runs/a/model. Models that would share it keep the whole name."""
    short = {model: (Path(model).parent if Path(model).name == "model" else Path(model)).name for model in models}
    names = list(short.values())
    return {model: name if names.count(name) == 1 else model.replace("/", "-") for model, name in short.items()}


def described(eval_sets: Sequence[EvalSet], model: str) -> dict[str, dict[str, Any]]:
    """Return what results.json says of each data set that a model was measured on; nothing of ratings."""
    ids, unknown = pictures.of_model(model)
    return {
        eval_set.name: _described(eval_set) | {"trained_on": _trained_on(eval_set, ids, unknown)}
        for eval_set in eval_sets
        if eval_set.ratings is None
    }


def _described(eval_set: EvalSet) -> dict[str, Any]:
    facts: dict[str, Any] = {"source": to_dict(eval_set.config), **counts(eval_set)}
    if eval_set.classes:
        facts |= {
            "classes": len(eval_set.classes),
            "absent_classes": len(eval_set.absent),
            "labels": eval_set.labels_by,
        }
    parts: dict[str, Any] = {f"shifted.{name}": counts(part) for name, part in eval_set.shifted.items()}
    if eval_set.train is not None:
        parts["train"] = {**counts(eval_set.train), "in_source": eval_set.train.in_source}
    if eval_set.config.gallery:
        parts["gallery"] = {"rows": eval_set.gallery_rows, "skipped": len(eval_set.gallery_skipped)}
    if eval_set.config.source.captions:
        facts["captions"] = {name: sum(map(len, eval_set.texts(name))) for name in eval_set.config.source.captions}
    if "languages" in eval_set.config.tasks:
        facts["pairs"] = _pairs(eval_set.captioned)
    templates = eval_set.used_templates
    return facts | ({"parts": parts} if parts else {}) | ({"templates": templates} if templates else {})


def counts(part: EvalSet) -> dict[str, Any]:
    """Return the rows read, those left out and the images measured of a set or of a part of one."""
    rows = len(part.images) + len(part.skipped) if part.num_rows is None else part.num_rows
    facts = {"rows": rows, "images": len(part.images), "skipped": len(part.skipped)}
    return facts | ({"cut": True} if part.cut else {})


def _pairs(eval_set: EvalSet) -> dict[str, Any]:
    """Return how many captions the task languages compares and leaves out, by pair of languages."""
    pairs = {}
    for first, second in itertools.combinations(eval_set.languages, 2):
        own = eval_set.pairs(first, second)
        compared = sum(map(len, own))
        left_out = {name: sum(map(len, eval_set.texts(name))) - compared for name in (first, second)}
        images = {"images": sum(map(bool, own)), "of": len(own)}
        pairs[f"{first}-{second}"] = {"compared": compared, **images, "left_out": left_out}
    return pairs


def _trained_on(eval_set: EvalSet, ids: pictures.Ids | None, unknown: list[str]) -> dict[str, Any]:
    tested = [
        eval_set.images,
        *(part.images for part in eval_set.shifted.values()),
        *(question.images for question in eval_set.questions),
    ]
    images = None if ids is None else sum(pictures.count(ids, shown.digests()) for shown in tested)
    return {"images": images, "of": sum(map(len, tested)), "unknown": unknown}


def notes(facts: Mapping[str, Facts]) -> list[str]:
    """Return what a reader of a data set's numbers should know of what they were measured on.

    Args:
        facts: What `described` returns, by the model's label; they differ in `trained_on` only.
    """
    first = next(iter(facts.values()))
    lines = [f"{name}: {text}" if name else text for name, text in _of_rows(first)]
    if first.get("captions"):
        lines.append(", ".join(f"{count:,} captions in {name}" for name, count in first["captions"].items()))
    lines += [_of_pairs(languages, pairs) for languages, pairs in first.get("pairs", {}).items()]
    if first.get("labels", "").startswith("number"):
        lines.append(f"classes by {first['labels']}")
    if first.get("absent_classes"):
        classes = first["classes"] + first["absent_classes"]
        lines.append(f"{first['absent_classes']:,} of {classes:,} classes have no image and are left out")
    for label, own in facts.items():
        for text in _of_training(own.get("trained_on", {})):
            lines.append(f"{label}: {text}" if len(facts) > 1 else text)
    return lines


def _of_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for name, part in {"": facts, **facts.get("parts", {})}.items():
        if "rows" not in part:  # written before rows were counted
            continue
        used = part["rows"] - part["skipped"]
        text = f"{used:,} of {part['rows']:,} rows, {part['skipped']:,} left out"
        if part.get("in_source"):
            text += f" ({part['in_source']:,} because the source holds the same image)"
        if part.get("images", used) != used:
            text += f", {part['images']:,} images"
        yield name, text + (", the first ones only (max_images)" if part.get("cut") else "")


def _of_pairs(languages: str, pairs: Facts) -> str:
    images = f"{pairs['images']:,} of {pairs['of']:,} images"
    text = f"{languages} compares {pairs['compared']:,} pairs of captions, in {images}"
    left_out = [f"{count:,} in {language}" for language, count in pairs["left_out"].items() if count]
    reason = "captions that have no counterpart at their place are left out"
    return f"{text}; {reason}: {', '.join(left_out)}" if left_out else text


def _of_training(trained: Facts) -> Iterator[str]:
    if trained.get("images"):
        yield f"{trained['images']:,} of {trained['of']:,} images tested are among those that the model was trained on"
    elif trained.get("images") == 0:
        yield f"none of {trained['of']:,} images tested is among those that the model was trained on"
    if trained.get("unknown"):
        yield f"not compared with the training images of {', '.join(trained['unknown'])}, which are not known here"
