"""Multiple choice: which of several texts fits each image? The share of right answers."""

from collections.abc import Callable, Mapping

import torch

from koclip.config import ConfigError, SourceConfig
from koclip.data.formats import scenes
from koclip.data.sources import Row
from koclip.evaluation.embed import Embedder, Images, collect
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.sets import EvalSet, Question
from koclip.metrics import Metric, first_ranks, share

_TASK_SIZE = 400  # images per question of the scenes


def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
    """Return each question's share of images whose right candidate scores highest; a tie is a miss."""
    metrics = {}
    for question in eval_set.questions:
        if language in question.candidates:
            images, unique = embedder.images(question.images), collect(question.candidates[language], [])
            place = {text: number for number, text in enumerate(unique.texts)}
            embedded = embedder.texts(unique.texts)
            places = torch.tensor([[place[text] for text in own] for own in question.candidates[language]])  # (I, K)
            similarity = torch.einsum("id,ikd->ik", images, embedded[places])
            right = torch.nn.functional.one_hot(torch.tensor(question.answers), places.shape[1]).bool()
            metrics[f"{question.name}/accuracy"] = share(
                first_ranks(similarity, right) == 0, chance=1 / places.shape[1]
            )
    return metrics


def _check(eval_set: EvalSet) -> None:
    if not eval_set.questions:
        raise ConfigError(
            f"eval.sets[].tasks: multiple_choice needs questions, and {eval_set.name} has none; expected data with "
            f"questions: {sorted(QUESTIONS)}"
        )


_HEADLINE = {"ko": "한국어 이름으로 분류한 정확도"}
_ACCURACY = Spec("{question}/accuracy", "{question}, accuracy", headline=_HEADLINE, watched=True)
TASK = Task(
    "multiple_choice",
    run,
    lambda eval_set: list(dict.fromkeys(name for question in eval_set.questions for name in question.candidates)),
    (_ACCURACY,),
    _check,
)


def questions_of(source: SourceConfig) -> list[Question]:
    """Return the questions of a data set; most have none."""
    return QUESTIONS[source.path]() if source.path in QUESTIONS else []


def _scenes() -> list[Question]:
    """Return the questions of the built-in set.

    `unseen_pairs`: which of 40 (colour, shape) pairs is the object? Training never showed these pairs.
    `relation`: where is one object, seen from the other (4-way)? `size` is 2-way, `count` is 3-way.
    """
    unseen = [scenes.unseen_pair(1, index) for index in range(_TASK_SIZE)]
    shown = [scenes.scene("test", 1, index) for index in range(12 * _TASK_SIZE)]
    by_kind = {kind: [scene for scene in shown if scene.kind == kind][:_TASK_SIZE] for kind in scenes.KINDS}
    return [
        _question("unseen_pairs", unseen, scenes.pair_question),
        _question("relation", by_kind["relation"], scenes.relation_question),
        _question("size", by_kind["single"], scenes.size_question),
        _question("count", by_kind["count"], scenes.count_question),
    ]


def _question(name: str, shown: list[scenes.Scene], ask: scenes.Question) -> Question:
    rows = [Row(scenes.draw(scene, number), {}, f"scenes/{name}/{number}") for number, scene in enumerate(shown)]
    asked = [ask(scene) for scene in shown]
    languages = asked[0][0]
    candidates = {language: [texts[language] for texts, _ in asked] for language in languages}
    return Question(name, Images(rows), candidates, [answer for _, answer in asked])


QUESTIONS: Mapping[str, Callable[[], list[Question]]] = {"scenes": _scenes}  # by the path of the data
