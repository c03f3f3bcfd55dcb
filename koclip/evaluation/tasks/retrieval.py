"""Retrieval of images and captions: in one language, compared between two languages, and with rewritten captions."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from koclip.config import ConfigError
from koclip.evaluation.embed import Embedder, UniqueCaptions, collect, search
from koclip.evaluation.results import MAIN, Spec, Task, Unit
from koclip.evaluation.sets import EvalSet
from koclip.metrics import KS, Gallery, Metric, mean, recall_at
from koclip.text.korean.stress import STRESSES

_KS = (1, 10)  # of comparisons between languages and with rewritten captions
_KS_APPROXIMATED = (1, 5)
_DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_Tensors = tuple[torch.Tensor, torch.Tensor]


def retrieval(embedder: Embedder, eval_set: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Return recall@k and the median rank in both directions. A query is a hit if any right entry is among the first k.

    `first_caption` metrics use only the first caption of each image, the protocol of most published Korean tables.
    Intervals resample images with all of their captions.
    """
    captions, metrics = eval_set.texts(language), dict[str, Metric]()
    protocols = {"": collect(captions, eval_set.gallery.get(language, []))}
    if any(len(texts) > 1 for texts in captions):
        protocols["_first_caption"] = collect([texts[:1] for texts in captions], [])
    for protocol, unique in protocols.items():
        forward, backward = _both_ways(unique, images, embedder.texts(unique.texts), embedder.spread)
        images_of, texts_of = map(_counts, (unique.images, unique.texts_of))
        galleries = (
            (None, None) if protocol else (Gallery(len(images), images_of), Gallery(len(unique.texts), texts_of))
        )
        recalls = {
            "text_to_image": recall_at(forward, _groups(unique), gallery=galleries[0]),
            "image_to_text": recall_at(backward, gallery=galleries[1]),
        }
        metrics |= {f"{task}{protocol}/{name}": value for task, own in recalls.items() for name, value in own.items()}
    return metrics


def _both_ways(captions: UniqueCaptions, images: torch.Tensor, texts: torch.Tensor, spread: bool) -> _Tensors:
    """Return the ranks of the captions that have an image, and of the images that have a caption."""
    shown = [image for image, own in enumerate(captions.texts_of) if own]
    forward, _ = search(texts[: len(captions.images)], images, captions.images, spread)
    backward, _ = search(images[shown], texts, [captions.texts_of[image] for image in shown], spread)
    return forward, backward


def approximated(captions: UniqueCaptions, exact: _Tensors, other: _Tensors, name: str) -> dict[str, Metric]:
    """Return recall@k of a model and of an approximation of it on the same queries, and `drop@k`, the difference.

    `exact` and `other` are the embeddings (N, D) of the images and (C, D) of the captions, by the model and by the
    approximation. The metrics of the approximation are named `text_to_image_<name>/recall@1`.
    """
    metrics: dict[str, Metric] = {}
    tasks = {"text_to_image": _groups(captions), "image_to_text": None}
    before, after = (_both_ways(captions, *embeddings, spread=False) for embeddings in (exact, other))
    for (task, groups), plain, ranks in zip(tasks.items(), before, after, strict=True):
        recalls, others = recall_at(plain, groups), recall_at(ranks, groups)
        for k in _KS_APPROXIMATED:
            metrics[f"{task}/recall@{k}"] = recalls[f"recall@{k}"]
            metrics[f"{task}_{name}/recall@{k}"] = others[f"recall@{k}"]
            metrics[f"{task}_{name}/drop@{k}"] = mean((plain < k).double() - (ranks < k).double(), groups)
    return metrics


def _counts(owned: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of positives of each query that has any."""
    return [len(own) for own in owned if own]


def _groups(captions: UniqueCaptions) -> torch.Tensor:
    """Return each caption's image (C,), the first of several."""
    return torch.tensor([images[0] for images in captions.images])


def languages(embedder: Embedder, eval_set: EvalSet, pair: tuple[str, str], images: torch.Tensor) -> dict[str, Metric]:
    """Compare retrieval in two languages: the recall gap, and how often both return the same top image.

    The captions compared are those of `EvalSet.pairs`.

    Raises:
        ConfigError: there is nothing to compare.
    """
    pairs = eval_set.pairs(*pair)
    groups = torch.tensor([image for image, own in enumerate(pairs) for _ in own])
    if not len(groups):
        raise ConfigError(
            f"{eval_set.name}: got no caption to compare in {pair[0]} and {pair[1]}; expected images with equally many "
            "captions in both languages"
        )
    (ranks, nearest), (other_ranks, other_nearest) = (
        _ranked_side(embedder, [[texts[side] for texts in own] for own in pairs], images) for side in (0, 1)
    )
    metrics = {f"gap@{k}": mean((ranks < k).double() - (other_ranks < k).double(), groups) for k in _KS}
    return {f"languages/{name}": metric for name, metric in metrics.items()} | {
        "languages/same_image": mean(nearest == other_nearest, groups)
    }


def _ranked_side(embedder: Embedder, captions: list[list[str]], images: torch.Tensor) -> _Tensors:
    """Return the rank and the nearest image of each caption, by image; equal captions are searched once."""
    unique = collect(captions, [])
    ranks, nearest = search(embedder.texts(unique.texts), images, unique.images, embedder.spread)
    place = {text: number for number, text in enumerate(unique.texts)}
    places = torch.tensor([place[text] for own in captions for text in own])
    return ranks[places], nearest[places]


def stress(embedder: Embedder, eval_set: EvalSet, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by rewritten Korean captions: `drop@k` is the loss of recall@k, `changed` the share of new captions.

    Raises:
        ConfigError: there is no Korean caption.
    """
    captions = collect(eval_set.texts("ko"), [])
    if not captions.images:
        raise ConfigError(f"{eval_set.name}: no image has a caption in ko; expected some for the task stress")
    groups = _groups(captions)
    plain = search(embedder.texts(captions.texts), images, captions.images, embedder.spread)[0]
    metrics = {}
    for name, rewrite in STRESSES.items():
        texts = [rewrite(text, eval_set.config.seed) for text in captions.texts]
        ranks = search(embedder.texts(texts), images, captions.images, embedder.spread)[0]
        changed = torch.tensor([new != old for new, old in zip(texts, captions.texts, strict=True)])
        metrics[f"stress_{name}/changed"] = mean(changed, groups)
        for k in _KS:
            metrics[f"stress_{name}/recall@{k}"] = mean(ranks < k, groups)
            metrics[f"stress_{name}/drop@{k}"] = mean((plain < k).double() - (ranks < k).double(), groups)
    return metrics


_HUB = "image-text-retrieval"
_HEADLINE = {"ko": "한국어 문장으로 이미지 찾기 R@10", "en": "영어 문장으로 이미지 찾기 R@10"}


def _recall_specs(protocol: str, group: str) -> list[Spec]:
    specs = []
    for direction, words in _DIRECTIONS.items():
        for k in KS:
            name, label = f"{direction}{protocol}/recall@{k}", f"{words}, R@{k}"
            params: dict[str, str | int] = {"direction": words, "k": k}
            chart = ("recall", "") if group == MAIN else ("", "")
            spec = Spec(name, label, group=group, params=params, chart=chart, hub_task=_HUB)
            if (name, group) == ("text_to_image/recall@10", MAIN):  # the headline number
                meaning = "captions that find their image among the first 10"
                spec = replace(spec, summary=meaning, headline=_HEADLINE, watched=True)
            specs.append(spec)
        specs.append(Spec(f"{direction}{protocol}/median_rank", f"{words}, median rank", "rank", group, hub_task=_HUB))
    return specs


def _approximated_specs() -> list[Spec]:
    specs = []
    for (direction, words), k in itertools.product(_DIRECTIONS.items(), _KS_APPROXIMATED):
        name, label = f"{direction}_{{approximation}}", f"{words}, R@{k}"
        params: dict[str, str | int] = {"direction": words, "k": k}
        specs.append(Spec(f"{name}/recall@{k}", label, group="{approximation}", params=params))
        specs.append(Spec(f"{name}/drop@{k}", label, "points", "{approximation}, lost", params))
    return specs


def _stress_specs() -> list[Spec]:
    specs = [Spec("stress_{rewrite}/changed", "{rewrite}", group="Captions that a rewrite changes")]
    for k in _KS:
        lost, kept = (f"stress_{{rewrite}}/{kind}@{k}" for kind in ("drop", "recall"))
        group, params = f"R@{k} of rewritten captions", {"k": k}
        specs.append(Spec(kept, "{rewrite}", group=group, params=params, chart=("stress", "kept")))
        spec = Spec(lost, "{rewrite}", "points", f"R@{k} lost by rewritten captions", params, chart=("stress", "lost"))
        meaning = "points of that lost by the worst rewriting of captions" if k == 10 else ""
        worst = f"R@{k} lost, worst rewrite"
        specs.append(replace(spec, worst=worst, summary=meaning, card="Korean as people type it"))
    return specs


def _captioned(
    measure: Callable[[Embedder, EvalSet, str, torch.Tensor], dict[str, Metric]],
) -> Callable[[Embedder, EvalSet, str], dict[str, Metric]]:
    """Return the `run` of a task that measures on the images with captions."""

    def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
        captioned = eval_set.captioned
        return measure(embedder, captioned, language, embedder.images(captioned.images))

    return run


def _pairs(eval_set: EvalSet) -> dict[str, tuple[str, str]]:
    both = itertools.combinations(eval_set.captioned.languages, 2)
    return {f"{first}-{second}": (first, second) for first, second in both}


RETRIEVAL = Task(
    "retrieval",
    _captioned(retrieval),
    lambda eval_set: eval_set.captioned.languages,
    (
        *_recall_specs("", MAIN),
        *_recall_specs("_first_caption", "Each image's first caption only"),
        *_approximated_specs(),
    ),
)
_GAP = "first minus second language"
_COMPARED: tuple[tuple[str, str, Unit, str], ...] = (
    ("gap@1", f"R@1, {_GAP}", "points", ""),
    ("gap@10", f"R@10, {_GAP}", "points", f"points of R@10, {_GAP}"),
    ("same_image", "same nearest image in both", "percent", ""),
)
_BETWEEN = "Between the languages"
LANGUAGES = Task(
    "languages",
    _captioned(lambda embedder, part, pair, images: languages(embedder, part, _pairs(part)[pair], images)),
    lambda eval_set: list(_pairs(eval_set)),
    tuple(
        Spec(f"languages/{name}", label, unit, summary=summary, card=_BETWEEN, hub_task=_HUB)
        for name, label, unit, summary in _COMPARED
    ),
)
STRESS = Task(
    "stress",
    _captioned(lambda embedder, part, _, images: stress(embedder, part, images)),
    lambda eval_set: ["ko"],
    tuple(_stress_specs()),
)
