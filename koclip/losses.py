"""Contrastive losses: embeddings in, a scalar out. No model, no data set.

Each process computes the rows of its own pairs against the gathered global batch. Averaging gradients over processes,
as DDP does, then gives exactly the gradient of the loss over the global batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from koclip import distributed
from koclip.config import LossConfig
from koclip.models.dual_encoder import Embeddings

SIGMOID_BIAS = -10.0  # initial bias of the sigmoid loss (Zhai et al. 2023, section 3.2)


class Loss(NamedTuple):
    """What a loss returns: the scalar to minimise and the share of images whose best text is theirs."""

    value: torch.Tensor  # ()
    accuracy: torch.Tensor  # () no gradient


LossFn = Callable[[Embeddings, torch.Tensor], Loss]


def build(config: LossConfig) -> LossFn:
    """Return the loss that a configuration names; it takes embeddings and caption ids (B,)."""
    loss = {"infonce": infonce, "sigmoid": sigmoid}[config.name]
    return partial(loss, equal_captions=config.equal_captions)


def initial_bias(config: LossConfig) -> float | None:
    """Return the bias that the loss starts from, None for losses without one."""
    return SIGMOID_BIAS if config.name == "sigmoid" else None


def infonce(embeddings: Embeddings, caption_ids: torch.Tensor, equal_captions: str = "negatives") -> Loss:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3).

    Args:
        embeddings: B pairs of this process.
        caption_ids: (B,) equal for equal captions.
        equal_captions: "negatives": only the own pair is right. "positives": the target is spread evenly over all
            pairs with the same caption. "masked": those other pairs take no part.
    """
    image, text, scale, _ = embeddings
    image_logits = scale * image @ distributed.gather(text).T  # (B, N)
    text_logits = scale * text @ distributed.gather(image).T  # (B, N)
    own, equal = _targets(caption_ids)
    if equal_captions == "masked":
        others = equal & ~own
        image_logits, text_logits = (x.masked_fill(others, float("-inf")) for x in (image_logits, text_logits))
    target = own.int().argmax(dim=1)
    if equal_captions == "positives":
        target = equal / equal.sum(dim=1, keepdim=True)  # (B, N) shares instead of (B,) places
    value = (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits, target)) / 2
    return Loss(value, _accuracy(image_logits, equal))


def sigmoid(embeddings: Embeddings, caption_ids: torch.Tensor, equal_captions: str = "negatives") -> Loss:
    """Pairwise sigmoid loss over the global batch (Zhai et al. 2023, equation 1): a sum over pairs, divided by N.

    Args:
        embeddings: B pairs of this process, with the loss's bias.
        caption_ids: (B,) equal for equal captions.
        equal_captions: As for `infonce`; "positives" counts each pair of equal captions as a match of its own.

    Raises:
        ValueError: there is no bias.
    """
    image, text, scale, bias = embeddings
    if bias is None:
        raise ValueError("the sigmoid loss needs a bias: build the DualEncoder with losses.initial_bias(config)")
    logits = scale * image @ distributed.gather(text).T + bias  # (B, N)
    own, equal = _targets(caption_ids)
    positive = equal if equal_captions == "positives" else own
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))  # (B, N)
    if equal_captions == "masked":
        terms = terms.masked_fill(equal & ~own, 0.0)
    return Loss(terms.sum(dim=1).mean(), _accuracy(logits, equal))


def _targets(caption_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of N pairs is each row's own (B, N), and which have its caption (B, N)."""
    everyone = distributed.gather(caption_ids)
    rows = torch.arange(len(caption_ids), device=caption_ids.device) + distributed.rank() * len(caption_ids)
    own = rows[:, None] == torch.arange(len(everyone), device=caption_ids.device)
    return own, caption_ids[:, None] == everyone[None, :]


@torch.no_grad()
def _accuracy(logits: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    best = logits.argmax(dim=1, keepdim=True)
    return equal.gather(1, best).float().mean()
