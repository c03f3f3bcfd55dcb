"""A model and opened data sets in, metrics out. Draws from generators of its own: evaluating never changes training."""

from collections.abc import Sequence
from dataclasses import replace

from koclip.config import EvalConfig, EvaluateConfig, check
from koclip.data.transforms import PIXEL_LIMIT, PixelLimit
from koclip.evaluation.embed import Embedder
from koclip.evaluation.results import Task, records_of
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import SPECS, TASKS
from koclip.evaluation.tasks.multiple_choice import questions_of
from koclip.evaluation.tasks.ratings import open_ratings
from koclip.metrics import Metric

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
