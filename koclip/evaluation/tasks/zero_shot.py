"""Classify images by the names of the classes, and by pictures of the same classes that look different."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from koclip.data.corruptions import SEVERITIES
from koclip.evaluation.embed import Embedder
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Metric, difference, mean, mean_per_class, share
from koclip.text.classes import templates_of_kind
from koclip.text.prompts import fill, has_particle, spelt_out

_Ranks = Callable[[torch.Tensor], torch.Tensor]  # of class embeddings (C, D): each image's rank


@dataclass(frozen=True)
class Names:
    """The candidates and which of them are right."""

    plain: list[str]
    described: list[str]  # with what they mean, where they may mean several things
    owned: list[list[int]]  # by image that has any: the right ones
    images: list[int]  # those images


def names_of(one: EvalSet, language: str) -> Names:
    """Return a set's candidates: its classes, or all captions of the set, of its shifts and of its gallery."""
    if one.classes:
        described = [name.text(language, described=True) for name in one.classes]
        plain = [name.text(language) for name in one.classes]
        return Names(plain, described, [[label] for label in one.labels], list(range(len(one.labels))))
    sets = [one, *one.shifted.values()]
    captions = [text for part in sets for own in part.texts(language) for text in own]
    plain = list(dict.fromkeys([*captions, *one.gallery.get(language, [])]))
    return Names(plain, plain, *_owned(one, language, plain))


def _owned(one: EvalSet, language: str, names: list[str]) -> tuple[list[list[int]], list[int]]:
    if one.labels:
        return [[label] for label in one.labels], list(range(len(one.labels)))
    place = {name: number for number, name in enumerate(names)}
    owned = [[place[text] for text in dict.fromkeys(own)] for own in one.texts(language)]
    images = [image for image, right in enumerate(owned) if right]
    return [owned[image] for image in images], images


def templates_of(one: EvalSet, language: str) -> list[str]:
    """Return the templates of a language: those listed, or those of a file, or the bare name."""
    asked = one.config.templates.get(language, ["{}"])
    return templates_of_kind(asked, one.config.template_kind, f"eval.sets[].templates.{language}")


def asked_templates(one: EvalSet) -> dict[str, list[str]]:
    """Return the templates that a set's classes are put in, by language."""
    if not {"zero_shot", "shift"} & set(one.config.tasks):
        return {}
    return {language: templates_of(one, language) for language in one.languages}


def classifier(embedder: Embedder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Return one unit-norm embedding per name and template, (C, T, D)."""
    prompts = [fill(template, name) for name in names for template in templates]
    texts = list(dict.fromkeys(prompts))
    place = {text: number for number, text in enumerate(texts)}
    return embedder.texts(texts)[[place[prompt] for prompt in prompts]].view(len(names), len(templates), -1)


def ensemble(prompts: torch.Tensor) -> torch.Tensor:
    """Return the mean of each class's unit-norm prompts (C, T, D), of unit norm again, (C, D): CLIP's ensemble."""
    return F.normalize(prompts.mean(dim=1), dim=-1)


def zero_shot(embedder: Embedder, one: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Classify images by their classes' names, or without classes by their captions.

    `zero_shot` is the ensemble of all templates. Compared with it: `zero_shot_name` the bare name, `zero_shot_single`
    the first template alone, `zero_shot_described` names with what they mean. `zero_shot_template_03` is the fourth
    template alone, compared with the bare name; `zero_shot_particles` all templates with particles, compared with
    `zero_shot_naive`, the same with "을(를)" spelt out. Gains are of accuracy, image by image.
    """
    names, templates = names_of(one, language), templates_of(one, language)
    shown = images[names.images]
    prompts = classifier(embedder, names.plain, templates)

    def ranks(classes: torch.Tensor) -> torch.Tensor:
        return embedder.search(shown, classes, names.owned)[0]

    together = ranks(ensemble(prompts))
    metrics = {"zero_shot/accuracy": share(together < 1), "zero_shot/accuracy@5": share(together < 5)}
    if one.labels:
        metrics["zero_shot/mean_per_class"] = mean_per_class(together < 1, torch.tensor(one.labels))
    if len(templates) > 1:
        bare = ranks(classifier(embedder, names.plain, ["{}"])[:, 0])
        alone = [ranks(prompts[:, number]) for number in range(len(templates))]
        metrics |= _compared("zero_shot_name", bare, together) | _compared("zero_shot_single", alone[0], together)
        for number, one_template in enumerate(alone):
            metrics |= _compared(f"zero_shot_template_{number:02d}", one_template, bare, "gain_over_name")
        metrics |= _particles(embedder, names.plain, templates, ranks)
    ambiguous = torch.tensor([names.described[right[0]] != names.plain[right[0]] for right in names.owned])
    if ambiguous.sum() > 1:
        told = ranks(ensemble(classifier(embedder, names.described, templates)))
        metrics |= _compared("zero_shot_described", told, together, "gain")
        metrics["zero_shot_described/gain_ambiguous"] = _gain(told[ambiguous], together[ambiguous])
    return metrics


def _particles(embedder: Embedder, names: Sequence[str], templates: Sequence[str], ranks: _Ranks) -> dict[str, Metric]:
    """Compare the templates that have particles with themselves, the particles spelt out as in 은(는)."""
    inflected = [template for template in templates if has_particle(template)]
    if not inflected:
        return {}
    right = ranks(ensemble(classifier(embedder, names, inflected)))
    naive = ranks(ensemble(classifier(embedder, names, [spelt_out(template) for template in inflected])))
    return {"zero_shot_naive/accuracy": share(naive < 1)} | _compared("zero_shot_particles", right, naive, "gain")


def _compared(
    task: str, ranks: torch.Tensor, other: torch.Tensor, gain: str = "gain_over_ensemble"
) -> dict[str, Metric]:
    return {f"{task}/accuracy": share(ranks < 1), f"{task}/{gain}": _gain(ranks, other)}


def _gain(ranks: torch.Tensor, other: torch.Tensor) -> Metric:
    return mean((ranks < 1).double() - (other < 1).double())


def shift(embedder: Embedder, one: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Classify pictures of the same classes that look different, and the same pictures corrupted.

    `drop` is the accuracy on the set itself less that on the other; a corruption's is the mean of its severities'
    (ImageNet-C without its weights).
    """
    names = names_of(one, language)
    classes = ensemble(classifier(embedder, names.plain, templates_of(one, language)))
    base = embedder.search(images[names.images], classes, names.owned)[0] < 1
    metrics = {"shift_none/accuracy": share(base)}
    for name, other in one.shifted.items():
        owned, shown = _owned(other, language, names.plain)
        hits = embedder.search(embedder.images(other.pictures)[shown], classes, owned)[0] < 1
        metrics |= {f"shift_{name}/accuracy": share(hits), f"shift_{name}/drop": difference(base, hits)}
    for name in one.config.corruptions:
        drops = []
        for severity in SEVERITIES:
            corrupted = embedder.images(one.pictures.corrupted(name, severity, one.config.seed))
            hits = embedder.search(corrupted[names.images], classes, names.owned)[0] < 1
            metrics[f"shift_{name}/accuracy_severity_{severity}"] = share(hits)
            drops.append(base.double() - hits.double())
        metrics[f"shift_{name}/drop"] = mean(torch.stack(drops).mean(dim=0))
    return metrics
