"""The methods with their settings, and how a setting is chosen: on validation images, by cross-validation or a rule.

The best setting has the lowest cross-entropy on held-out images among those with as many right answers as zero-shot.
Accuracy alone is a coarse measure on a few images, and chooses settings that are too far from zero-shot. The first
setting of every method is zero-shot, and of equal settings the first wins. Test images are never seen here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from koclip.classifiers import coop as context
from koclip.classifiers.heads import Head, Shots, linear, tip_adapter, tip_adapter_f, zero_shot
from koclip.config import check

METHODS = ("zero_shot", "linear", "tip_adapter", "tip_adapter_f", "coop")
LINEAR = ("zero_shot", "linear", "coop")  # whose classifier is a matrix
_VARIANCES = (0.0, 1.0, 10.0, 100.0, 1000.0)
_ALPHAS, _BETAS = (1.0, 3.0, 10.0, 30.0), (1.0, 5.0, 20.0)
_FOLDS = 4  # of cross-validation at most
_FEW_FOLDS = 2  # for methods that train for long

Settings = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A method with the settings to choose from.

    Args:
        name: One of `METHODS`.
        settings: The settings; the first is zero-shot.
        rule: The setting for one image per class, where nothing can be held out.
        fit: Fits some of the settings: from class texts (C, D), as in `koclip.classifiers.heads`, shots, and settings,
            to a head for each.
        folds: The most folds of cross-validation.
    """

    name: str
    settings: tuple[Settings, ...]
    rule: Settings
    fit: Callable[[torch.Tensor, Shots, Sequence[Settings]], list[Head]]
    folds: int = _FOLDS


class HeldOut(NamedTuple):
    """Logits (n, C) of images that were not fitted on, their classes (n,) and their indices in the shots (n,).

    `rows` is None if they are validation images.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor | None = None

    @property
    def hits(self) -> torch.Tensor:
        """Which images are classified right (n,)."""
        return self.logits.argmax(dim=1) == self.labels


@dataclass(frozen=True)
class Fitted:
    """A fitted classifier.

    Args:
        method: Name of the method.
        head: The classifier, fitted on all shots.
        settings: The chosen settings.
        chosen_by: `validation`, `cross-validation`, or `rule`.
        held_out: What the choice was made on; None if by a rule.
    """

    method: str
    head: Head
    settings: Settings
    chosen_by: str
    held_out: HeldOut | None


def method(name: str, prompts: context.Prompts | None = None) -> Method:
    """Return a method by its name; `coop` needs the prompts.

    Raises:
        ConfigError: there is no such method.
    """
    check(name in METHODS, "methods", name, f"expected some of {list(METHODS)}")
    off: Settings = {"alpha": 0.0, "beta": 1.0}
    grid = tuple({"alpha": alpha, "beta": beta} for alpha in _ALPHAS for beta in _BETAS)
    rule: Settings = {"alpha": 3.0, "beta": 5.0}
    if name == "zero_shot":
        return Method(name, ({},), {}, lambda texts, _, settings: [zero_shot(texts) for _ in settings])
    if name == "linear":
        variances = tuple({"variance": variance} for variance in _VARIANCES)
        return Method(name, variances, {"variance": 10.0}, _each(linear))
    if name == "tip_adapter":
        return Method(name, (off, *grid), rule, _each(tip_adapter))
    if name == "tip_adapter_f":
        few = ({"alpha": alpha, "beta": beta} for alpha in _ALPHAS[:3] for beta in _BETAS[:2])
        return Method(name, (off, *few), rule, _each(tip_adapter_f), _FEW_FOLDS)
    assert prompts is not None
    steps = tuple({"steps": float(step)} for step in (0, *context.STEPS[1:]))

    def fit(texts: torch.Tensor, shots: Shots, settings: Sequence[Settings]) -> list[Head]:
        wanted = sorted({int(each["steps"]) for each in settings} - {0})
        heads = dict(zip(wanted, context.coop(prompts, shots, wanted), strict=True)) if wanted else {}
        return [heads.get(int(each["steps"]), zero_shot(texts)) for each in settings]

    return Method(name, steps, {"steps": 5.0}, fit, _FEW_FOLDS)


def _each(function: Callable[..., Head]) -> Callable[[torch.Tensor, Shots, Sequence[Settings]], list[Head]]:
    return lambda texts, shots, settings: [function(texts, shots, **each) for each in settings]


def fit(chosen: Method, texts: torch.Tensor, shots: Shots, validation: Shots | None = None, seed: int = 0) -> Fitted:
    """Choose the best setting and fit it on all shots.

    It is the best on the validation images. Without them it is the best in cross-validation: the images of each class
    are dealt into at most `folds` folds, in an order drawn with the seed; a class with one image is in no fold and
    always fitted on. If every class has one image, the setting is the method's `rule`.
    """
    settings = chosen.settings
    if chosen.name == "zero_shot":  # nothing is fitted, so nothing need be held out
        head, tested = zero_shot(texts), shots if validation is None else validation
        rows = torch.arange(len(shots.labels)) if validation is None else None
        by = "cross-validation" if validation is None else "validation"
        return Fitted(chosen.name, head, {}, by, HeldOut(head.logits(tested.images), tested.labels, rows))
    if validation is not None:
        heads = chosen.fit(texts, shots, settings)
        tries = [HeldOut(head.logits(validation.images), validation.labels) for head in heads]
        best = _best(tries)
        return Fitted(chosen.name, heads[best], settings[best], "validation", tries[best])
    folds = _folds(shots.labels, chosen.folds, seed)
    if not folds:
        return Fitted(chosen.name, chosen.fit(texts, shots, [chosen.rule])[0], chosen.rule, "rule", None)
    rows = torch.cat(folds)
    logits: list[list[torch.Tensor]] = [[] for _ in settings]
    for held in folds:
        others = torch.ones(len(shots.labels), dtype=torch.bool)
        others[held] = False
        for place, head in enumerate(chosen.fit(texts, shots.of(others), settings)):
            logits[place].append(head.logits(shots.images[held]))
    tries = [HeldOut(torch.cat(parts), shots.labels[rows], rows) for parts in logits]
    best = _best(tries)
    head = chosen.fit(texts, shots, [settings[best]])[0]
    return Fitted(chosen.name, head, settings[best], "cross-validation", tries[best])


def choose(candidates: Sequence[Fitted]) -> Fitted:
    """Return zero-shot, which must be the first, or the best of the methods with more right answers on held-out images.

    Methods whose setting was chosen by a rule have no held-out images and are not chosen.
    """
    plain = candidates[0].held_out
    better = [
        (each, each.held_out)
        for each in candidates[1:]
        if each.held_out is not None
        and plain is not None
        and each.held_out.hits.sum() > _same(plain, each.held_out).sum()
    ]
    return better[_lowest([held_out for _, held_out in better])][0] if better else candidates[0]


def _same(plain: HeldOut, other: HeldOut) -> torch.Tensor:
    """Return which of the images of `other` zero-shot classifies right; its own are all shots, or the same images."""
    return plain.hits if other.rows is None else plain.hits[other.rows]


def _best(tries: Sequence[HeldOut]) -> int:
    """Return the index of the best setting; the first is zero-shot."""
    able = [place for place, each in enumerate(tries) if each.hits.sum() >= tries[0].hits.sum()]
    return able[_lowest([tries[place] for place in able])]


def _lowest(tries: Sequence[HeldOut]) -> int:
    """Return the index of the lowest cross-entropy; of equal ones the first."""
    losses = [float(F.cross_entropy(each.logits, each.labels)) for each in tries]
    return losses.index(min(losses))


def _folds(labels: torch.Tensor, most: int, seed: int) -> list[torch.Tensor]:
    """Return the rows of each fold; none if every class has one image."""
    generator = torch.Generator().manual_seed(seed)
    places = [(labels == label).nonzero()[:, 0] for label in labels.unique().tolist()]
    shuffled = [own[torch.randperm(len(own), generator=generator)] for own in places]
    several = [own for own in shuffled if len(own) > 1]
    count = min(most, max(map(len, several), default=0))
    dealt = [torch.cat([own[number::count] for own in several]) for number in range(count)]
    return [fold for fold in dealt if len(fold)]


def describe(settings: Settings) -> dict[str, Any]:
    """Return settings for a reader: whole numbers without a point."""
    return {name: int(value) if value == int(value) else value for name, value in settings.items()}
