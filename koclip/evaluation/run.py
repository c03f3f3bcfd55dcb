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
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from koclip import distributed, storage
from koclip.config import ConfigError, EvalConfig, EvaluateConfig, check, dump, to_dict
from koclip.data.transforms import PIXEL_LIMIT, PixelLimit
from koclip.evaluation.embed import Embedder
from koclip.evaluation.results import Task, records_of
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import SPECS, TASKS
from koclip.evaluation.tasks.multiple_choice import questions_of
from koclip.evaluation.tasks.ratings import open_ratings
from koclip.metrics import Metric
from koclip.storage import environment
from koclip.training import pictures

_MOST_UNKNOWN = 0.1  # share of tokens; the right tokenizer loses next to none


def open_all(config: EvalConfig | EvaluateConfig, limit: PixelLimit = PIXEL_LIMIT) -> list[EvalSet]:
    """Open all data sets and ratings, and check that they suffice for their tasks: before a model is loaded or trained.

    Raises:
        ConfigError: a task does not exist, or a set cannot be opened or is too small for its tasks.
    """
    names = [task.name for task in TASKS]
    for set_config in config.sets:
        unknown = sorted(set(set_config.tasks) - set(names))
        check(not unknown, "eval.sets[].tasks", unknown, f"expected some of {names}")
    eval_sets = []
    for set_config in config.sets:
        eval_sets.append(replace(open_set(set_config, limit), questions=questions_of(set_config.source)))
    eval_sets += [open_ratings(ratings, limit) for ratings in config.ratings]
    for eval_set in eval_sets:
        for task in _tasks_of(eval_set):
            if task.check:
                task.check(eval_set)
    return eval_sets


def evaluate(embedder: Embedder, eval_sets: Sequence[EvalSet]) -> dict[str, Metric]:
    """Return every metric of every set, named <data set>/<language>/<task>/<metric>.

    The task `languages` has two languages in the place of the language, as in ko-en; probes have `images`.

    Raises:
        ValueError: a task returns a number that its specs do not describe.
    """
    metrics: dict[str, Metric] = {}
    for eval_set in eval_sets:
        asked = [(task, task.languages(eval_set)) for task in _tasks_of(eval_set)]
        languages = [*eval_set.languages, *(language for _, own in asked for language in own)]
        for language in dict.fromkeys(languages):
            for task, own in asked:
                if language in own:
                    numbers = task.run(embedder, eval_set, language)
                    measured = {f"{eval_set.name}/{language}/{key}": metric for key, metric in numbers.items()}
                    _check_specs(task, measured)
                    metrics |= measured
    return metrics


def _tasks_of(eval_set: EvalSet) -> list[Task]:
    return [task for task in TASKS if task.name in eval_set.tasks]


def _check_specs(task: Task, metrics: dict[str, Metric]) -> None:
    for record in records_of(metrics, SPECS):
        if record.spec not in task.specs:
            raise ValueError(
                f"evaluation task {task.name}: got the number {record.key}, which none of its specs describes, or "
                f"which another task describes more exactly: {record.spec.pattern}"
            )


def warnings_of(embedder: Embedder, eval_sets: Sequence[EvalSet]) -> list[str]:
    """Return what a reader of the numbers should know: classes without images, letters that the model cannot read."""
    warnings = [warning for eval_set in eval_sets for warning in eval_set.warnings]
    for eval_set in eval_sets:
        for language in eval_set.languages:
            texts = [text for own in eval_set.texts(language) for text in own]
            texts += [name.text(language) for name in eval_set.classes]
            unknown = embedder.encoder.unknown_share(texts[:1_000]) if texts else 0.0
            if unknown > _MOST_UNKNOWN:
                warnings.append(
                    f"{eval_set.name}/{language}: {unknown:.0%} of the tokens are unknown to the tokenizer of "
                    f"{embedder.encoder.name}; its numbers in that language say nothing"
                )
    return warnings


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
