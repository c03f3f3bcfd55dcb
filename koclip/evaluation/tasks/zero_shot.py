"""Zero-shot classification by the names of the classes, and its accuracy under distribution shift."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit

from koclip.data.transforms import SEVERITIES
from koclip.evaluation.embed import Embedder, search
from koclip.evaluation.results import Spec, Task, records_of
from koclip.evaluation.sets import EvalSet
from koclip.metrics import Gallery, Metric, difference, mean, mean_per_class, share
from koclip.text.classes import fill, has_particle, spelt_out

_FEWEST = 3  # other models that the line of effective robustness needs
_EDGE = 0.5  # images; keeps accuracies away from 0 and 1, whose logits are infinite
_Ranks = Callable[[torch.Tensor], torch.Tensor]  # from class embeddings (C, D) to each image's rank


@dataclass(frozen=True)
class Names:
    """The candidate names, and which of them are right for each image."""

    plain: list[str]
    described: list[str]  # ambiguous names with their meaning
    owned: list[list[int]]  # by image in `images`: the indices of the right names
    images: list[int]  # the images with at least one right name


def names_of(eval_set: EvalSet, language: str) -> Names:
    """Return a set's candidates: its classes, or all captions of the set, of its shifted sets and of its gallery."""
    if eval_set.classes:
        plain = [name.text(language) for name in eval_set.classes]
        described = [name.text(language, described=True) for name in eval_set.classes]
    else:
        sets = [eval_set, *eval_set.shifted.values()]
        captions = [text for part in sets for own in part.texts(language) for text in own]
        plain = described = list(dict.fromkeys([*captions, *eval_set.gallery.get(language, [])]))
    return Names(plain, described, *_owned(eval_set, language, plain))


def _owned(eval_set: EvalSet, language: str, names: list[str]) -> tuple[list[list[int]], list[int]]:
    """Return `Names.owned` and `Names.images` of a set."""
    if eval_set.labels:
        return [[label] for label in eval_set.labels], list(range(len(eval_set.labels)))
    place = {name: number for number, name in enumerate(names)}
    owned = [[place[text] for text in dict.fromkeys(own)] for own in eval_set.texts(language)]
    images = [image for image, right in enumerate(owned) if right]
    return [owned[image] for image in images], images


def classifier(embedder: Embedder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Return one unit-norm embedding per name and template, (C, T, D)."""
    prompts = [fill(template, name) for name in names for template in templates]
    texts = list(dict.fromkeys(prompts))
    place = {text: number for number, text in enumerate(texts)}
    return embedder.texts(texts)[[place[prompt] for prompt in prompts]].view(len(names), len(templates), -1)


def ensemble(prompts: torch.Tensor) -> torch.Tensor:
    """Return the normalized mean (C, D) of each class's unit-norm prompts (C, T, D): CLIP's ensemble."""
    return F.normalize(prompts.mean(dim=1), dim=-1)


def zero_shot(embedder: Embedder, eval_set: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Classify images by the names of their classes, or without classes by their captions.

    `zero_shot` is the ensemble of all templates. Three variants are compared with it: `zero_shot_name` uses the bare
    name, `zero_shot_single` the first template, `zero_shot_described` names with their meaning.
    `zero_shot_template_03` uses the fourth template and is compared with the bare name. `zero_shot_particles` uses the
    templates with particles and is compared with `zero_shot_naive`, the same with both forms as in "을(를)". Gains are
    differences of accuracy, image by image.
    """
    names, templates = names_of(eval_set, language), eval_set.templates(language)
    prompts = classifier(embedder, names.plain, templates)

    def ranks(classes: torch.Tensor) -> torch.Tensor:
        return search(images[names.images], classes, names.owned, embedder.spread)[0]

    together = ranks(ensemble(prompts))
    gallery = Gallery(len(names.plain), list(map(len, names.owned)))
    metrics = {"zero_shot/accuracy": share(together < 1, gallery.chance(1))}
    if len(names.plain) > 5:  # else every image is a hit
        metrics["zero_shot/accuracy@5"] = share(together < 5, gallery.chance(5))
    if eval_set.labels:
        metrics["zero_shot/mean_per_class"] = mean_per_class(together < 1, torch.tensor(eval_set.labels))
    if len(templates) > 1:
        bare = ranks(classifier(embedder, names.plain, ["{}"])[:, 0])
        alone = [ranks(prompts[:, number]) for number in range(len(templates))]
        metrics |= _compared("zero_shot_name", bare, together) | _compared("zero_shot_single", alone[0], together)
        for number, single in enumerate(alone):
            metrics |= _compared(f"zero_shot_template_{number:02d}", single, bare, "gain_over_name")
        metrics |= _particles(embedder, names.plain, templates, ranks)
    ambiguous = torch.tensor([names.described[right[0]] != names.plain[right[0]] for right in names.owned])
    if ambiguous.sum() > 1:
        described = ranks(ensemble(classifier(embedder, names.described, templates)))
        metrics |= _compared("zero_shot_described", described, together, "gain")
        metrics["zero_shot_described/gain_ambiguous"] = _gain(described[ambiguous], together[ambiguous])
    return metrics


def _particles(embedder: Embedder, names: Sequence[str], templates: Sequence[str], ranks: _Ranks) -> dict[str, Metric]:
    """Compare the templates that have particles with the same templates with both forms, as in 은(는)."""
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


def shift(embedder: Embedder, eval_set: EvalSet, language: str, images: torch.Tensor) -> dict[str, Metric]:
    """Classify the images of other data sets with the same classes, and the set's own images with corruptions.

    `drop` is the accuracy on the original set minus that on the other set; of a corruption, the mean over its
    severities (ImageNet-C without its weights).
    """
    names = names_of(eval_set, language)
    classes = ensemble(classifier(embedder, names.plain, eval_set.templates(language)))
    base = search(images[names.images], classes, names.owned, embedder.spread)[0] < 1
    metrics = {"shift_none/accuracy": share(base)}
    for name, other in eval_set.shifted.items():
        owned, shown = _owned(other, language, names.plain)
        hits = search(embedder.images(other.images)[shown], classes, owned, embedder.spread)[0] < 1
        metrics |= {f"shift_{name}/accuracy": share(hits), f"shift_{name}/drop": difference(base, hits)}
    for name in eval_set.config.corruptions:
        drops = []
        for severity in SEVERITIES:
            corrupted = embedder.images(eval_set.images.corrupted(name, severity, eval_set.config.seed))
            hits = search(corrupted[names.images], classes, names.owned, embedder.spread)[0] < 1
            metrics[f"shift_{name}/accuracy_severity_{severity}"] = share(hits)
            drops.append(base.double() - hits.double())
        metrics[f"shift_{name}/drop"] = mean(torch.stack(drops).mean(dim=0))
    return metrics


def effective_robustness(base: Metric, shifted: Metric, others: list[tuple[Metric, Metric]]) -> Metric:
    """Return the accuracy under shift minus the accuracy that a line through the other models predicts.

    Taori et al. 2020, section 4: the line is fitted on logits of accuracies. The interval is that of the accuracy under
    shift; it leaves out the error of the line.

    Args:
        base: The model's accuracy on the original set.
        shifted: Its accuracy on the shifted set.
        others: Both accuracies of the other models.

    Raises:
        ValueError: there are fewer than three other models, or all of them have the same base accuracy.
    """
    points = np.array([[_logit(before), _logit(after)] for before, after in others])
    if len(points) < _FEWEST or np.ptp(points[:, 0]) == 0:
        raise ValueError(f"others: got {len(points)} models, expected at least {_FEWEST} of different base accuracy")
    slope, offset = np.polyfit(points[:, 0], points[:, 1], deg=1)
    expected = float(expit(slope * _logit(base) + offset))
    low, high = shifted.ci95
    return Metric(shifted.value - expected, (low - expected, high - expected), shifted.n)


def _logit(accuracy: Metric) -> float:
    edge = _EDGE / accuracy.n
    return float(logit(np.clip(accuracy.value, edge, 1 - edge)))


def add_effective_robustness(results: dict[str, dict[str, Metric]]) -> None:
    """Add `effective_robustness` to every shift of every model's metrics if there are enough other models."""
    for model, metrics in results.items():
        for record in records_of(metrics, [_BASE, _SHIFTED]):
            if record.spec is not _SHIFTED:
                continue
            base = f"{record.dataset}/{record.language}/{_BASE.pattern}"
            others = [(other[base], other[record.name]) for name, other in results.items() if name != model]
            if len(others) >= _FEWEST and len({before.value for before, _ in others}) > 1:
                robustness = effective_robustness(metrics[base], metrics[record.name], others)
                metrics[f"{record.dataset}/{record.language}/{record.task}/effective_robustness"] = robustness


def confusions(embedder: Embedder, eval_set: EvalSet) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield for each language the numbers of images (C, C) by class and answer; nothing for a set without classes."""
    if not eval_set.classes:
        return
    labels, size = torch.tensor(eval_set.labels), len(eval_set.classes)
    images = embedder.images(eval_set.images)
    for language in eval_set.languages:
        names = names_of(eval_set, language).plain
        classes = ensemble(classifier(embedder, names, eval_set.templates(language)))
        answers = search(images, classes, labels[:, None].tolist(), embedder.spread)[1]
        yield language, torch.bincount(labels * size + answers, minlength=size**2).view(size, size)


_BARE, _ALONE = "zero_shot_name/gain_over_ensemble", "zero_shot_template_{template:d}"
_GAIN = "Each template alone, minus the bare name"
ZERO_SHOT = Task(
    "zero_shot",
    lambda embedder, eval_set, language: zero_shot(embedder, eval_set, language, embedder.images(eval_set.images)),
    lambda eval_set: eval_set.languages,
    (
        Spec(
            "zero_shot/accuracy",
            "zero-shot accuracy",
            summary="images classified correctly by the names of the classes",
            chart=("shots", "zero-shot"),
            headline={"ko": "한국어 이름으로 분류한 정확도"},
            watched=True,
        ),
        Spec("zero_shot/mean_per_class", "zero-shot, mean over classes"),
        Spec("zero_shot/accuracy@5", "zero-shot, among the first 5"),
        Spec("zero_shot_single/gain_over_ensemble", "first template minus all", "points"),
        Spec(_BARE, "bare name minus all templates", "points", chart=("templates", "bare")),
        Spec("zero_shot_particles/gain", "right particles minus both forms", "points"),
        Spec("zero_shot_described/gain", "described names minus plain", "points"),
        Spec("zero_shot_described/gain_ambiguous", "the same, ambiguous names", "points"),
        Spec(f"{_ALONE}/accuracy", "template {template:02d}", group="Each template alone, accuracy"),
        Spec(f"{_ALONE}/gain_over_name", "template {template:02d}", "points", _GAIN, chart=("templates", "gain")),
        Spec("zero_shot_{prompt}/accuracy", "{prompt}", group="Accuracy by kind of prompt"),
    ),
    confusions=confusions,
)
_UNDER_SHIFT, _NONE = "Accuracy under shift", {"name": ""}
_BASE = Spec("shift_none/accuracy", "accuracy without shift", params=_NONE, chart=("shift", "base"), watched=True)
_SHIFTED = Spec("shift_{name}/accuracy", "{name}", group=_UNDER_SHIFT, chart=("shift", "shifted"))
_SEVERITY = "shift_{name}/accuracy_severity_{severity:d}"
SHIFT = Task(
    "shift",
    lambda embedder, eval_set, language: shift(embedder, eval_set, language, embedder.images(eval_set.images)),
    lambda eval_set: eval_set.languages,
    (
        _BASE,
        Spec("shift_{name}/drop", "accuracy lost, {name}", "points"),
        Spec("shift_{name}/effective_robustness", "effective robustness, {name}", "points"),
        Spec(_SEVERITY, "{name}, severity {severity}", group=_UNDER_SHIFT, chart=("shift", "severity")),
        _SHIFTED,
    ),
)
