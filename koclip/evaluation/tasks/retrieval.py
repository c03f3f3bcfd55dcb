"""Images by captions and captions by images: in one language, in two, and under stress."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from koclip.config import ConfigError
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric, mean, recall_at, search
from koclip.text.korean.stress import STRESSES

_KS = (1, 10)  # of comparisons
_KS_APPROXIMATED = (1, 5)
_Ranks = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Captions:
    """Distinct captions and whose they are. Equal captions are one caption with several images."""

    texts: list[str]  # those of the gallery, which no image has, at the end
    images: list[list[int]]  # by caption that an image has: the images
    texts_of: list[list[int]]  # by image: its captions


def collect(captions: list[list[str]], gallery: list[str]) -> Captions:
    """Return the distinct captions of the images and of the gallery."""
    place = {text: number for number, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    images: list[list[int]] = [[] for _ in place]
    for image, own in enumerate(captions):
        for text in dict.fromkeys(own):
            images[place[text]].append(image)
    others = [text for text in dict.fromkeys(gallery) if text not in place]
    return Captions([*place, *others], images, [[place[text] for text in dict.fromkeys(own)] for own in captions])


def retrieval(embedder: Embedder, one: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by captions and captions by images; any right one among the first k counts.

    `first_caption` rows use each image's first caption only, the protocol of most published Korean tables. Intervals
    resample images with all of their captions.
    """
    captions = one.texts(language)
    metrics = _ranked(embedder, collect(captions, one.gallery.get(language, [])), images, "")
    if any(len(texts) > 1 for texts in captions):
        metrics |= _ranked(embedder, collect([texts[:1] for texts in captions], []), images, "_first_caption")
    return metrics


def _ranked(embedder: Embedder, captions: Captions, images: torch.Tensor, protocol: str) -> dict[str, Metric]:
    forward, backward = _both_ways(captions, images, embedder.texts(captions.texts), embedder.search)
    found = {"text_to_image": recall_at(forward, _groups(captions)), "image_to_text": recall_at(backward)}
    return {f"{task}{protocol}/{name}": metric for task, own in found.items() for name, metric in own.items()}


def _both_ways(captions: Captions, images: torch.Tensor, texts: torch.Tensor, search: Callable[..., _Ranks]) -> _Ranks:
    """Return the rank of each caption that an image has, and that of each image with a caption in this language."""
    asked = texts[: len(captions.images)]
    shown = [image for image, own in enumerate(captions.texts_of) if own]
    forward, _ = search(asked, images, captions.images)
    backward, _ = search(images[shown], texts, [captions.texts_of[image] for image in shown])
    return forward, backward


def approximated(
    captions: Captions, exact: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], name: str
) -> dict[str, Metric]:
    """Return recall@k of a model and of an approximation of it on the same queries, and `drop@k`, what that one loses.

    Args:
        captions: Those of the images.
        exact: The model's embeddings (N, D) of the images and (C, D) of the captions.
        other: The approximation's.
        name: What its metrics are called: `text_to_image_<name>/recall@1`.
    """
    metrics: dict[str, Metric] = {}
    tasks = {"text_to_image": _groups(captions), "image_to_text": None}
    before, after = (_both_ways(captions, *one, search) for one in (exact, other))
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


def languages(embedder: Embedder, one: EvalSet, first: str, second: str, images: torch.Tensor) -> dict[str, Metric]:
    """Ask the same in two languages: what the first finds more often, and how often both find the same image.

    Captions correspond by their places in images that have equally many in both languages; a place that is empty in
    either of them is left out.
    """
    pairs = [(image, pair) for image, own in enumerate(one.pairs(first, second)) for pair in own]
    if not pairs:
        raise ConfigError(
            f"{one.name}: no image has equally many captions in {first} and {second}, with both at one place: none can "
            "be compared"
        )
    groups = torch.tensor([image for image, _ in pairs])
    found = []
    for side in (0, 1):
        texts = list(dict.fromkeys(pair[side] for _, pair in pairs))
        owners: dict[str, set[int]] = {text: set() for text in texts}
        for image, pair in pairs:
            owners[pair[side]].add(image)
        ranks, nearest = embedder.search(embedder.texts(texts), images, [sorted(owners[text]) for text in texts])
        place = {text: number for number, text in enumerate(texts)}
        asked = torch.tensor([place[pair[side]] for _, pair in pairs])
        found.append((ranks[asked], nearest[asked]))
    (ranks, nearest), (other_ranks, other_nearest) = found
    metrics = {f"gap@{k}": mean((ranks < k).double() - (other_ranks < k).double(), groups) for k in _KS}
    return {f"languages/{name}": metric for name, metric in metrics.items()} | {
        "languages/same_image": mean(nearest == other_nearest, groups)
    }


def stress(embedder: Embedder, one: EvalSet, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by rewritten Korean captions; `drop@k` is what recall@k loses, `changed` the share that changed."""
    captions = collect(one.texts("ko"), [])
    if not captions.images:
        raise ConfigError(f"{one.name}: no image has a caption in ko, which the task stress rewrites")
    groups = _groups(captions)
    plain = embedder.search(embedder.texts(captions.texts), images, captions.images)[0]
    metrics = {}
    for name, rewrite in STRESSES.items():
        texts = [rewrite(text, one.config.seed) for text in captions.texts]
        ranks = embedder.search(embedder.texts(texts), images, captions.images)[0]
        changed = torch.tensor([new != old for new, old in zip(texts, captions.texts, strict=True)])
        metrics[f"stress_{name}/changed"] = mean(changed, groups)
        for k in _KS:
            metrics[f"stress_{name}/recall@{k}"] = mean(ranks < k, groups)
            metrics[f"stress_{name}/drop@{k}"] = mean((plain < k).double() - (ranks < k).double(), groups)
    return metrics
