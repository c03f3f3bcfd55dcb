"""Open the data, evaluate a model on it, and describe the data in results.json.

`data.<set>` of results.json has these keys. `source`: the configuration. `rows`: rows read; `skipped`: those left out;
`images`: images measured (rows of equal images are one image). `cut`: whether reading stopped at `max_images`. `parts`:
the same for train, shifted sets and gallery. `captions`: their number by language. `pairs`: for the task `languages`,
the captions `compared`, in `images` images `of` all, and those `left_out`. `classes`: their number; `absent_classes`:
those left out; `labels`: how the data name them. `trained_on`: how many `images` `of` all tested images the model was
trained on, null if unknown; `unknown`: the models whose training images are unknown.
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
from koclip.evaluation.forgetting import comparable
from koclip.evaluation.results import Record, Task, records_of
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import SPECS, TASKS
from koclip.evaluation.tasks.multiple_choice import questions_of
from koclip.evaluation.tasks.ratings import open_ratings
from koclip.metrics import Metric
from koclip.storage import environment
from koclip.training import pictures

_COMPARED_IMAGES = 8
_MOST_UNKNOWN = 0.1  # share of unknown tokens; the right tokenizer has almost none


def open_all(config: EvalConfig | EvaluateConfig, limit: PixelLimit = PIXEL_LIMIT) -> list[EvalSet]:
    """Open all data sets and ratings, and check that they have enough data for their tasks, before a model is loaded.

    Raises:
        ConfigError: a task does not exist, or a set cannot be opened or is too small for its tasks.
    """
    names = [task.name for task in TASKS]
    for each in config.sets:
        unknown = sorted(set(each.tasks) - set(names))
        check(not unknown, "eval.sets[].tasks", unknown, f"expected some of {names}")
    eval_sets = [replace(open_set(each, limit), questions=questions_of(each.source)) for each in config.sets]
    eval_sets += [open_ratings(ratings, limit) for ratings in config.ratings]
    for eval_set in eval_sets:
        for task in _tasks_of(eval_set):
            if task.check:
                task.check(eval_set)
    return eval_sets


def evaluate(
    embedder: Embedder, eval_sets: Sequence[EvalSet], only: Sequence[Record] | None = None
) -> dict[str, Metric]:
    """Return every metric of every set, named `<data set>/<language>/<task>/<metric>`.

    Instead of a language, the task `languages` has a pair such as ko-en, and probes have `images`. With `only`, just
    the tasks run that measured these records, on the same sets and in the same languages.

    Raises:
        ValueError: a task returns a number that its specs do not describe.
    """
    metrics: dict[str, Metric] = {}
    for eval_set in eval_sets:
        tasks = [(task, task.languages(eval_set)) for task in _tasks_of(eval_set)]
        languages = [*eval_set.languages, *(language for _, own in tasks for language in own)]
        for language, (task, own) in itertools.product(dict.fromkeys(languages), tasks):
            wanted = only is None or any(_is_of(record, eval_set, language, task) for record in only)
            if language in own and wanted:
                numbers = task.run(embedder, eval_set, language)
                measured = {f"{eval_set.name}/{language}/{key}": metric for key, metric in numbers.items()}
                for record in records_of(measured, SPECS):
                    if record.spec not in task.specs:
                        raise ValueError(
                            f"evaluation task {task.name}: got the number {record.key}; expected a spec of this task "
                            f"to match it better than the spec {record.spec.pattern}"
                        )
                metrics |= measured
    return metrics


def _is_of(record: Record, eval_set: EvalSet, language: str, task: Task) -> bool:
    return (record.dataset, record.language) == (eval_set.name, language) and record.spec in task.specs


def evaluate_source(
    source: Embedder, model: Embedder, eval_sets: Sequence[EvalSet], metrics: Mapping[str, Metric]
) -> dict[str, Metric]:
    """Evaluate the source of a model in the tasks in which both are compared (`koclip.evaluation.forgetting`).

    `metrics` are the model's; they show which tasks these are. If both models embed the first images the same, bit for
    bit, no image is embedded a second time.
    """
    pictures = next((eval_set.images for eval_set in eval_sets if len(eval_set.images)), None)
    if pictures is not None:
        source.share_images(model, pictures[:_COMPARED_IMAGES])
    return evaluate(source, eval_sets, comparable(metrics, SPECS))


def _tasks_of(eval_set: EvalSet) -> list[Task]:
    return [task for task in TASKS if task.name in eval_set.tasks]


def warnings_of(embedder: Embedder, eval_sets: Sequence[EvalSet]) -> list[str]:
    """Return warnings about the numbers: classes without images, and text that the tokenizer does not know."""
    warnings = [warning for eval_set in eval_sets for warning in eval_set.warnings]
    for eval_set in eval_sets:
        for language in eval_set.languages:
            texts = [text for own in eval_set.texts(language) for text in own]
            texts += [name.text(language) for name in eval_set.classes]
            unknown = embedder.encoder.unknown_share(texts[:1_000]) if texts else 0.0
            if unknown > _MOST_UNKNOWN:
                warnings.append(
                    f"{eval_set.name}/{language}: {unknown:.0%} of the tokens are unknown to the tokenizer of "
                    f"{embedder.encoder.name}; its numbers in that language mean nothing"
                )
    return warnings


Facts = Mapping[str, Any]


def processes(config: EvaluateConfig) -> Accelerator:
    """Return the accelerator, which connects the processes of a launch.

    Raises:
        ConfigError: several processes were launched and are not connected. On a CPU torchrun needs
            ACCELERATE_USE_CPU=true; without it each process would evaluate everything.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, and {accelerator.num_processes} is connected; on CPUs launch with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched}`"
        )
    return accelerator


def start(config: EvaluateConfig, eval_sets: Sequence[EvalSet]) -> Path:
    """Create the run directory with config.yaml and skipped.jsonl, and return it, the same on every process."""
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
    """Return the environment of results.json: without the number of processes, which changes no number."""
    return {name: value for name, value in environment().items() if name != "num_processes"}


def folders_of(run: Path, models: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each model's results: the run directory, or for several models folders in it."""
    labels = labels_of(models)
    return {model: run / labels[model] if len(models) > 1 else run for model in models}


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model, such as a for runs/a/model; names that are not unique stay long."""
    short = {model: (Path(model).parent if Path(model).name == "model" else Path(model)).name for model in models}
    names = list(short.values())
    return {model: name if names.count(name) == 1 else model.replace("/", "-") for model, name in short.items()}


def described(eval_sets: Sequence[EvalSet], model: str) -> dict[str, dict[str, Any]]:
    """Return the description of each data set in results.json; ratings have none."""
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
    """Return the numbers of rows and images of a set or of a part of a set."""
    rows = len(part.images) + len(part.skipped) if part.num_rows is None else part.num_rows
    facts = {"rows": rows, "images": len(part.images), "skipped": len(part.skipped)}
    return facts | ({"cut": True} if part.cut else {})


def _pairs(eval_set: EvalSet) -> dict[str, Any]:
    """Return the numbers of captions that the task languages compares and leaves out, by pair of languages."""
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
    images = None if ids is None else sum(pictures.count(ids, shown.digests) for shown in tested)
    return {"images": images, "of": sum(map(len, tested)), "unknown": unknown}


def notes(facts: Mapping[str, Facts]) -> list[str]:
    """Return notes for readers on a data set: rows, captions, classes, and training images among the test images.

    `facts` has the data set's entry of `described` by the model's label; the entries differ only in `trained_on`.
    """
    first = next(iter(facts.values()))
    lines = [f"{name}: {text}" if name else text for name, text in _row_notes(first)]
    if first.get("captions"):
        lines.append(", ".join(f"{count:,} captions in {name}" for name, count in first["captions"].items()))
    lines += [_pair_note(languages, pairs) for languages, pairs in first.get("pairs", {}).items()]
    if first.get("labels", "").startswith("number"):
        lines.append(f"classes by {first['labels']}")
    if first.get("absent_classes"):
        classes = first["classes"] + first["absent_classes"]
        lines.append(f"{first['absent_classes']:,} of {classes:,} classes have no image and are left out")
    for label, own in facts.items():
        for text in _training_notes(own.get("trained_on", {})):
            lines.append(f"{label}: {text}" if len(facts) > 1 else text)
    return lines


def _row_notes(facts: Facts) -> Iterator[tuple[str, str]]:
    for name, part in {"": facts, **facts.get("parts", {})}.items():
        if "rows" not in part:  # results.json of a koclip that did not count rows
            continue
        used = part["rows"] - part["skipped"]
        text = f"{used:,} of {part['rows']:,} rows, {part['skipped']:,} left out"
        if part.get("in_source"):
            text += f" ({part['in_source']:,} because the source has the same image)"
        if part.get("images", used) != used:
            text += f", {part['images']:,} images"
        yield name, text + (", the first ones only (max_images)" if part.get("cut") else "")


def _pair_note(languages: str, pairs: Facts) -> str:
    images = f"{pairs['images']:,} of {pairs['of']:,} images"
    text = f"{languages} compares {pairs['compared']:,} pairs of captions, in {images}"
    left_out = [f"{count:,} in {language}" for language, count in pairs["left_out"].items() if count]
    return f"{text}; captions without a counterpart are left out: {', '.join(left_out)}" if left_out else text


def _training_notes(trained: Facts) -> Iterator[str]:
    if trained.get("images") is not None:
        yield f"the model was trained on {trained['images']:,} of the {trained['of']:,} test images"
    if trained.get("unknown"):
        yield f"the training images of {', '.join(trained['unknown'])} are unknown here, so they are not compared"
