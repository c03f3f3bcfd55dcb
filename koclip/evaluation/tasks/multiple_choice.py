"""Multiple-choice tasks: which of its candidate texts fits each picture."""

from dataclasses import dataclass

from koclip.data.formats import scenes
from koclip.data.sources import Row
from koclip.evaluation.images import Pictures

_TASK_SIZE = 400  # questions per scenes task


@dataclass(frozen=True)
class Choice:
    """One task. Everything by position."""

    name: str
    pictures: Pictures
    candidates: dict[str, list[list[str]]]  # by language, then by picture
    answers: list[int]


def scene_choices() -> list[Choice]:
    """Return the built-in set's zero-shot tasks.

    `unseen_pairs`: the (colour, shape) of a lone object, among all 40, though training never showed that pair.
    `relation`: where one object is from another (4-way). `size` (2-way) and `count` (3-way).
    """
    unseen = [scenes.unseen_pair(1, index) for index in range(_TASK_SIZE)]
    shown = [scenes.scene("test", 1, index) for index in range(12 * _TASK_SIZE)]
    by_kind = {kind: [scene for scene in shown if scene.kind == kind][:_TASK_SIZE] for kind in scenes.KINDS}
    return [
        _choice("unseen_pairs", unseen, scenes.pair_question),
        _choice("relation", by_kind["relation"], scenes.relation_question),
        _choice("size", by_kind["single"], scenes.size_question),
        _choice("count", by_kind["count"], scenes.count_question),
    ]


def _choice(name: str, shown: list[scenes.Scene], question: scenes.Question) -> Choice:
    rows = [Row(scenes.draw(scene, number), {}, f"scenes/{name}/{number}") for number, scene in enumerate(shown)]
    asked = [question(scene) for scene in shown]
    languages = asked[0][0]
    candidates = {language: [texts[language] for texts, _ in asked] for language in languages}
    return Choice(name, Pictures(rows), candidates, [answer for _, answer in asked])
