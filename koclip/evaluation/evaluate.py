"""A model and opened data sets in, metrics out. Draws from generators of its own: evaluating never changes training."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from koclip.config import EvalSetConfig
from koclip.config.evaluation import CAPTIONED
from koclip.data.transforms import PIXEL_LIMIT, PixelLimit
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks.multiple_choice import Choice
from koclip.evaluation.tasks.probe import check_probes, few_shot, linear_probe
from koclip.evaluation.tasks.retrieval import languages, retrieval, stress
from koclip.evaluation.tasks.zero_shot import shift, zero_shot
from koclip.metrics import Metric, first_ranks, share

IMAGES = "images"  # in the place of the language, for tasks that read no text
_IN_ONE_LANGUAGE = {"retrieval": retrieval, "zero_shot": zero_shot, "shift": shift}
_OF_IMAGES = {"linear_probe": linear_probe, "few_shot": few_shot}
_MOST_UNKNOWN = 0.1  # share of tokens; the right tokenizer loses next to none


def open_all(configs: Sequence[EvalSetConfig], limit: PixelLimit = PIXEL_LIMIT) -> list[EvalSet]:
    """Open data sets, and make sure that they have enough for the tasks they ask for: before a model is trained.

    Raises:
        ConfigError: one cannot be opened, or is too small.
    """
    sets = [open_set(one, limit) for one in configs]
    for one in sets:
        if set(one.config.tasks) & set(_OF_IMAGES):
            check_probes(one)
    return sets


def evaluate(embedder: Embedder, sets: Sequence[EvalSet]) -> dict[str, Metric]:
    """Return every metric of every set, named <data set>/<language>/<task>/<metric>.

    `languages` has two in the place of the language, as in ko-en; probes have `images`.
    """
    metrics: dict[str, Metric] = {}
    for one in sets:
        for language, found in _tasks(embedder, one):
            metrics |= {f"{one.name}/{language}/{name}": metric for name, metric in found.items()}
    return metrics


def _tasks(embedder: Embedder, one: EvalSet) -> Iterator[tuple[str, dict[str, Metric]]]:
    """Yield the metrics of each task of a set, with the language they are in."""
    asked = one.config.tasks
    captioned = one.captioned if set(asked) & set(CAPTIONED) else one
    for language, task in itertools.product(dict.fromkeys([*one.languages, *captioned.languages]), _IN_ONE_LANGUAGE):
        part = captioned if task in CAPTIONED else one
        if task in asked and language in part.languages:
            yield language, _IN_ONE_LANGUAGE[task](embedder, part, language, embedder.images(part.pictures))
    if "stress" in asked:
        yield "ko", stress(embedder, captioned, embedder.images(captioned.pictures))
    if "languages" in asked:
        for first, second in itertools.combinations(captioned.languages, 2):
            images = embedder.images(captioned.pictures)
            yield f"{first}-{second}", languages(embedder, captioned, first, second, images)
    for task in _OF_IMAGES:
        if task in asked:
            yield IMAGES, _OF_IMAGES[task](embedder, one)
    for choice in one.choices:
        for language, metric in choose(embedder, choice).items():
            yield language, {f"{choice.name}/accuracy": metric}


def choose(embedder: Embedder, choice: Choice) -> dict[str, Metric]:
    """Return the share of pictures whose right candidate scores highest, by language; a tie is a miss."""
    images = embedder.images(choice.pictures)
    metrics = {}
    for language, candidates in choice.candidates.items():
        texts = list(dict.fromkeys(text for one in candidates for text in one))
        place = {text: index for index, text in enumerate(texts)}
        embedded = embedder.texts(texts)
        which = torch.tensor([[place[text] for text in one] for one in candidates])  # (I, K)
        similarity = torch.einsum("id,ikd->ik", images, embedded[which])
        right = torch.nn.functional.one_hot(torch.tensor(choice.answers), which.shape[1]).bool()
        metrics[language] = share(first_ranks(similarity, right) == 0)
    return metrics


def warnings_of(embedder: Embedder, sets: Sequence[EvalSet]) -> list[str]:
    """Return what a reader of the numbers should know: classes without images, letters that the model cannot read."""
    found = [warning for one in sets for warning in one.warnings]
    for one in sets:
        for language in one.languages:
            texts = [text for own in one.texts(language) for text in own]
            texts += [name.text(language) for name in one.classes]
            unknown = embedder.encoder.unknown_share(texts[:1_000]) if texts else 0.0
            if unknown > _MOST_UNKNOWN:
                found.append(
                    f"{one.name}/{language}: {unknown:.0%} of the tokens are unknown to the tokenizer of "
                    f"{embedder.encoder.name}; its numbers in that language say nothing"
                )
    return found
