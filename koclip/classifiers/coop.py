"""CoOp: learned context in front of the class names (Zhou et al. 2022), with one context for all classes.

The context starts from the token vectors of ordinary words, and Adam moves it. Nothing else changes, so a classifier by
CoOp is a matrix of class texts, as zero-shot is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from koclip.classifiers.heads import Head, Shots, zero_shot
from koclip.config import check
from koclip.encoders import Encoder
from koclip.encoders.base import evaluating
from koclip.encoders.transformers import TransformersEncoder

STARTS = {"ko": "사진 속의", "en": "a photo of a"}  # any other language starts from English words
STEPS = (0, 5, 10, 20, 40)  # after which a classifier is kept
_LR = 0.1  # of the deviation of the model's token vectors: their size differs by a factor of ten between models
_CLASSES = 32  # in a step at most, drawn at random: each is embedded with gradients
_BATCH = 64  # names embedded at once without gradients


@dataclass(frozen=True)
class Prompts:
    """What the context is learned with.

    Args:
        encoder: A dual encoder of transformers.
        names: The names of the C classes.
        start: The words whose vectors the context starts from.
        seed: Seed of the classes that are drawn in each step.
    """

    encoder: TransformersEncoder
    names: Sequence[str]
    start: str
    seed: int = 0

    @classmethod
    def of(cls, encoder: Encoder, names: Sequence[str], language: str, seed: int = 0) -> "Prompts":
        """Return the prompts of a language.

        Raises:
            ConfigError: the encoder is not a model of transformers, whose text tower takes vectors for words.
        """
        fits = isinstance(encoder, TransformersEncoder)
        fix = "expected a model of transformers for coop: leave coop out of methods"
        check(fits, "model", f"{encoder.name}, a {type(encoder).__name__}", fix)
        assert isinstance(encoder, TransformersEncoder)
        return cls(encoder, names, STARTS.get(language, STARTS["en"]), seed)


def coop(prompts: Prompts, shots: Shots, steps: Sequence[int] = STEPS) -> list[Head]:
    """Learn the context on the shots; return the classifier after each of these numbers of steps, ascending.

    A step minimises the cross-entropy of all shots of the drawn classes, among these classes.
    """
    encoder, generator = prompts.encoder, torch.Generator().manual_seed(prompts.seed)
    start = encoder.token_vectors(prompts.start)
    context = start.clone().requires_grad_()  # (M, E)
    optimizer = torch.optim.Adam([context], lr=_LR * encoder.token_deviation)
    heads: list[Head] = []
    with evaluating(encoder.model, gradients=True):
        for step in range(max(steps) + 1):
            if step in steps:
                heads.append(zero_shot(encoder.scale * _texts(prompts, context.detach())))
            if step < max(steps):
                drawn = torch.randperm(len(prompts.names), generator=generator)[:_CLASSES].sort().values
                (context.grad,) = torch.autograd.grad(_loss(prompts, context, shots, drawn), context)
                optimizer.step()
    return heads


def _loss(prompts: Prompts, context: torch.Tensor, shots: Shots, drawn: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the shots of some classes (ascending), among these classes."""
    texts = prompts.encoder.texts_behind(context, [prompts.names[place] for place in drawn.tolist()]).cpu()
    own = shots.of(torch.isin(shots.labels, drawn))
    labels = torch.searchsorted(drawn, own.labels)
    return F.cross_entropy(prompts.encoder.scale * own.images @ texts.T, labels)


def _texts(prompts: Prompts, context: torch.Tensor) -> torch.Tensor:
    """Return the class texts (C, D) behind a context."""
    names = prompts.names
    with torch.no_grad():
        parts = [
            prompts.encoder.texts_behind(context, names[start : start + _BATCH]).cpu()
            for start in range(0, len(names), _BATCH)
        ]
    return torch.cat(parts)
