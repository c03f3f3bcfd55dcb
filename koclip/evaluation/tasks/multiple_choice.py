"""Multiple choice: which of its candidate texts fits each image? The share of right answers."""

from collections.abc import Callable, Mapping

import torch

from koclip.config import ConfigError, SourceConfig
from koclip.data.formats import scenes
from koclip.data.sources import Row
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.sets import EvalSet, Question
from koclip.metrics import Metric, first_ranks, share

_TASK_SIZE = 400  # images per question of the scenes


def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
    """Return each question's share of images whose right candidate scores highest; a tie is a miss."""
    asked = [question for question in eval_set.questions if language in question.candidates]
    return {f"{question.name}/accuracy": _accuracy(embedder, question, language) for question in asked}


def _accuracy(embedder: Embedder, question: Question, language: str) -> Metric:
    images, candidates = embedder.images(question.images), question.candidates[language]
    texts = list(dict.fromkeys(text for own in candidates for text in own))
    place = {text: number for number, text in enumerate(texts)}
    embedded = embedder.texts(texts)
    places = torch.tensor([[place[text] for text in own] for own in candidates])  # (I, K)
    similarity = torch.einsum("id,ikd->ik", images, embedded[places])
    right = torch.nn.functional.one_hot(torch.tensor(question.answers), places.shape[1]).bool()
    return share(first_ranks(similarity, right) == 0)


def _languages(eval_set: EvalSet) -> list[str]:
    return list(dict.fromkeys(language for question in eval_set.questions for language in question.candidates))


def _check(eval_set: EvalSet) -> None:
    if not eval_set.questions:
        raise ConfigError(
            f"eval.sets[].tasks: multiple_choice, but {eval_set.name} has no questions; data with questions: "
            f"{sorted(QUESTIONS)}"
        )


_HEADLINE = {"ko": "한국어 이름으로 분류한 정확도"}
_ACCURACY = Spec("{question}/accuracy", "{question}, accuracy", headline=_HEADLINE, watched=True)
TASK = Task("multiple_choice", run, _languages, (_ACCURACY,), _check)


def questions_of(source: SourceConfig) -> list[Question]:
    """Return the questions that a data set brings with it; most bring none."""
    return QUESTIONS[source.path]() if source.path in QUESTIONS else []


def _scenes() -> list[Question]:
    """Return the questions of the built-in set.

    `unseen_pairs`: the (colour, shape) of a single object, among all 40, though training never showed that pair.
    `relation`: where an object is from another (4-way). `size` (2-way) and `count` (3-way).
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
