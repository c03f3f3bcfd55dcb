"""A model and opened data sets in, metrics out. Draws no random number, so that evaluating never changes training."""

from collections.abc import Sequence

import torch
from transformers import ProcessorMixin

from koclip.evaluation.sets import Choice, EvalSet
from koclip.metrics import Metric, first_ranks, recall_at, share
from koclip.models import StockModel
from koclip.models.inference import embed_images, embed_texts
from koclip.text.prompts import fill


class Encoder:
    """Embeds with one model and one batch size."""

    def __init__(self, model: StockModel, processor: ProcessorMixin, batch_size: int) -> None:
        self._model, self._processor, self._batch_size = model, processor, batch_size

    def images(self, images: Sequence[object]) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        return embed_images(self._model, self._processor, images, self._batch_size)  # type: ignore[arg-type]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        return embed_texts(self._model, self._processor, texts, self._batch_size)


def evaluate(encoder: Encoder, sets: Sequence[EvalSet]) -> dict[str, Metric]:
    """Return every metric of every set, named <data set>/<language>/<task>/<metric>."""
    metrics: dict[str, Metric] = {}
    for one in sets:
        images = encoder.images(one.pictures)
        for language in one.languages:
            found: dict[str, Metric] = {}
            if "retrieval" in one.config.tasks:
                found |= retrieval(encoder, one, language, images)
            if "zero_shot" in one.config.tasks:
                found |= zero_shot(encoder, one, language, images)
            metrics |= {f"{one.name}/{language}/{name}": metric for name, metric in found.items()}
        for choice in one.choices:
            for language, metric in choose(encoder, choice).items():
                metrics[f"{one.name}/{language}/{choice.name}/accuracy"] = metric
    return metrics


def retrieval(encoder: Encoder, one: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Rank images by captions and captions by images; equal captions are one caption with several images.

    `first_caption` rows use each image's first caption only, the protocol of most published Korean tables.
    """
    captions = [captions.get(language, []) for captions in one.captions]
    metrics = _ranked("text_to_image", "image_to_text", encoder, captions, one.gallery.get(language, []), images)
    if any(len(texts) > 1 for texts in captions):
        firsts = [texts[:1] for texts in captions]
        metrics |= _ranked("text_to_image_first_caption", "image_to_text_first_caption", encoder, firsts, [], images)
    return metrics


def _ranked(
    to_image: str,
    to_text: str,
    encoder: Encoder,
    captions: list[list[str]],
    gallery: list[str],
    images: torch.Tensor,
) -> dict[str, Metric]:
    texts = list(dict.fromkeys(caption for one in [*captions, gallery] for caption in one))
    place = {text: index for index, text in enumerate(texts)}
    positives = torch.zeros(len(texts), len(images), dtype=torch.bool)
    for image, owned in enumerate(captions):
        for caption in owned:
            positives[place[caption], image] = True
    similarity = encoder.texts(texts) @ images.T  # (T, I)
    asked = positives.any(dim=1)  # captions of the gallery belong to no image
    shown = positives.any(dim=0)  # images without a caption in this language
    forward = recall_at(first_ranks(similarity[asked], positives[asked]))
    backward = recall_at(first_ranks(similarity.T[shown], positives.T[shown]))
    return {f"{to_image}/{name}": metric for name, metric in forward.items()} | {
        f"{to_text}/{name}": metric for name, metric in backward.items()
    }


def zero_shot(encoder: Encoder, one: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Classify images by their captions as class names; prompts of a class are averaged (CLIP's ensemble)."""
    captions = [captions.get(language, []) for captions in one.captions]
    names = list(dict.fromkeys(caption for texts in [*captions, one.gallery.get(language, [])] for caption in texts))
    templates = one.config.templates.get(language, ["{}"])
    prompts = encoder.texts([fill(template, name) for name in names for template in templates])
    classes = prompts.view(len(names), len(templates), -1).mean(dim=1)
    classes = torch.nn.functional.normalize(classes, dim=-1)  # (C, D)
    place = {name: index for index, name in enumerate(names)}
    positives = torch.zeros(len(images), len(names), dtype=torch.bool)
    for image, owned in enumerate(captions):
        for name in owned:
            positives[image, place[name]] = True
    named = positives.any(dim=1)
    ranks = first_ranks((images @ classes.T)[named], positives[named])
    return {"zero_shot/accuracy": share(ranks < 1), "zero_shot/accuracy@5": share(ranks < 5)}


def choose(encoder: Encoder, choice: Choice) -> dict[str, Metric]:
    """Return the share of pictures whose right candidate scores highest, by language; a tie is a miss."""
    images = encoder.images(choice.pictures)
    metrics = {}
    for language, candidates in choice.candidates.items():
        texts = list(dict.fromkeys(text for one in candidates for text in one))
        place = {text: index for index, text in enumerate(texts)}
        embedded = encoder.texts(texts)
        which = torch.tensor([[place[text] for text in one] for one in candidates])  # (I, K)
        similarity = torch.einsum("id,ikd->ik", images, embedded[which])
        right = torch.nn.functional.one_hot(torch.tensor(choice.answers), which.shape[1]).bool()
        metrics[language] = share(first_ranks(similarity, right) == 0)
    return metrics
