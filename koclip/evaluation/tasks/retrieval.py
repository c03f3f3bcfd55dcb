"""Images by captions and captions by images: in a language, compared between two, and by rewritten captions."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from koclip.config import ConfigError
from koclip.evaluation.embed import Captions, Embedder, collect, search
from koclip.evaluation.results import MAIN, Spec, Task, Unit
from koclip.evaluation.sets import EvalSet
from koclip.metrics import KS, Metric, mean, recall_at
from koclip.text.korean.stress import STRESSES

_KS = (1, 10)  # of comparisons
_KS_APPROXIMATED = (1, 5)
_DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_Ranks = tuple[torch.Tensor, torch.Tensor]


def retrieval(embedder: Embedder, eval_set: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by captions and captions by images; any right one among the first k counts.

    `first_caption` rows use each image's first caption only, the protocol of most published Korean tables. Intervals
    resample images with all of their captions.
    """
    captions = eval_set.texts(language)
    metrics = _ranked(embedder, collect(captions, eval_set.gallery.get(language, [])), images, "")
    if any(len(texts) > 1 for texts in captions):
        metrics |= _ranked(embedder, collect([texts[:1] for texts in captions], []), images, "_first_caption")
    return metrics


def _ranked(embedder: Embedder, captions: Captions, images: torch.Tensor, protocol: str) -> dict[str, Metric]:
    forward, backward = _both_ways(captions, images, embedder.texts(captions.texts), embedder.spread)
    recalls = {"text_to_image": recall_at(forward, _groups(captions)), "image_to_text": recall_at(backward)}
    return {f"{task}{protocol}/{name}": metric for task, own in recalls.items() for name, metric in own.items()}


def _both_ways(captions: Captions, images: torch.Tensor, texts: torch.Tensor, spread: bool) -> _Ranks:
    """Return the rank of each caption that an image has, and that of each image with a caption in this language."""
    asked = texts[: len(captions.images)]
    shown = [image for image, own in enumerate(captions.texts_of) if own]
    forward, _ = search(asked, images, captions.images, spread)
    backward, _ = search(images[shown], texts, [captions.texts_of[image] for image in shown], spread)
    return forward, backward


def approximated(
    captions: Captions, exact: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], name: str
) -> dict[str, Metric]:
    """Return recall@k of a model and of an approximation of it on the same queries, and `drop@k`, the difference.

    Args:
        captions: Those of the images.
        exact: The model's embeddings (N, D) of the images and (C, D) of the captions.
        other: The approximation's.
        name: What its metrics are called: `text_to_image_<name>/recall@1`.
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


def _groups(captions: Captions) -> torch.Tensor:
    """Return the image that each caption belongs to, the first where there are several."""
    return torch.tensor([images[0] for images in captions.images])


def languages(embedder: Embedder, eval_set: EvalSet, pair: tuple[str, str], images: torch.Tensor) -> dict[str, Metric]:
    """Compare retrieval in two languages: the recall gap, and how often both return the same top image.

    Captions correspond by their places in images that have equally many in both languages; a place that is empty in
    either of them is left out.

    Raises:
        ConfigError: there is nothing to compare.
    """
    pairs = [(image, texts) for image, own in enumerate(eval_set.pairs(*pair)) for texts in own]
    if not pairs:
        raise ConfigError(
            f"{eval_set.name}: no image has equally many captions in {pair[0]} and {pair[1]}, with both at one place: "
            "none can be compared"
        )
    groups = torch.tensor([image for image, _ in pairs])
    (ranks, nearest), (other_ranks, other_nearest) = (
        _ranked_side(embedder, [(image, texts[side]) for image, texts in pairs], images) for side in (0, 1)
    )
    metrics = {f"gap@{k}": mean((ranks < k).double() - (other_ranks < k).double(), groups) for k in _KS}
    return {f"languages/{name}": metric for name, metric in metrics.items()} | {
        "languages/same_image": mean(nearest == other_nearest, groups)
    }


def _ranked_side(embedder: Embedder, pairs: Sequence[tuple[int, str]], images: torch.Tensor) -> _Ranks:
    """Return rank and nearest image of each (image, text); equal texts are searched once, for all of their images."""
    owners: dict[str, set[int]] = {}
    for image, text in pairs:
        owners.setdefault(text, set()).add(image)
    texts = list(owners)
    positives = [sorted(owners[text]) for text in texts]
    ranks, nearest = search(embedder.texts(texts), images, positives, embedder.spread)
    place = {text: number for number, text in enumerate(texts)}
    asked = torch.tensor([place[text] for _, text in pairs])
    return ranks[asked], nearest[asked]


def stress(embedder: Embedder, eval_set: EvalSet, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by rewritten Korean captions; `drop@k` is what recall@k loses, `changed` the share that changed.

    Raises:
        ConfigError: there is no Korean caption.
    """
    captions = collect(eval_set.texts("ko"), [])
    if not captions.images:
        raise ConfigError(f"{eval_set.name}: no image has a caption in ko, which the task stress rewrites")
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
    """Return what the numbers of both directions are called."""
    specs = []
    for direction, words in _DIRECTIONS.items():
        for k in KS:
            name, label = f"{direction}{protocol}/recall@{k}", f"{words}, R@{k}"
            params: dict[str, str | int] = {"direction": words, "k": k}
            chart = ("recall", "") if group == MAIN else ("", "")
            spec = Spec(name, label, group=group, params=params, chart=chart, hub_task=_HUB)
            if (name, group) == ("text_to_image/recall@10", MAIN):  # the number that stands for all
                meaning = "captions that find their image among the first 10"
                spec = replace(spec, summary=meaning, headline=_HEADLINE, watched=True)
            specs.append(spec)
        specs.append(Spec(f"{direction}{protocol}/median_rank", f"{words}, median rank", "rank", group, hub_task=_HUB))
    return specs


def _approximated_specs() -> list[Spec]:
    """Return what the numbers of `approximated` are called."""
    specs = []
    for direction, words in _DIRECTIONS.items():
        for k in _KS_APPROXIMATED:
            name, label = f"{direction}_{{approximation}}", f"{words}, R@{k}"
            params: dict[str, str | int] = {"direction": words, "k": k}
            specs.append(Spec(f"{name}/recall@{k}", label, group="{approximation}", params=params))
            specs.append(Spec(f"{name}/drop@{k}", label, "points", "{approximation}, lost", params))
    return specs


def _stress_specs() -> list[Spec]:
    """Return what the numbers of `stress` are called."""
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
    """Return a task's `run`: it measures on the images that have captions."""

    def run(embedder: Embedder, eval_set: EvalSet, language: str) -> dict[str, Metric]:
        captioned = eval_set.captioned
        return measure(embedder, captioned, language, embedder.images(captioned.images))

    return run


def _pairs(eval_set: EvalSet) -> dict[str, tuple[str, str]]:
    """Return every pair of languages, by what stands in the place of the language."""
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
_GAP = "first less second language"
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
