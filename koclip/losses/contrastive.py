"""The contrastive losses as in their papers, with all similarities at once, and distances to a teacher.

A loss takes `Embeddings` and returns a `Loss`; `Pairs` says which pairs of a batch belong together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from koclip import distributed
from koclip.config import check

CAPTION, IMAGE, SENTENCE = range(3)  # columns of pair_ids
DUPLICATES = ("positives", "masked", "negatives")


class Embeddings(NamedTuple):
    """A batch in the shared space."""

    image: torch.Tensor  # (B, D) unit norm; (B, 0) in batches without images
    text: torch.Tensor  # (B, D) unit norm
    logit_scale: torch.Tensor  # () already exponentiated: the inverse temperature
    logit_bias: torch.Tensor | None = None  # () added to the logits, for losses with a bias
    text_norm: torch.Tensor | None = None  # (B,) norms of the text features before normalisation


class Loss(NamedTuple):
    """The scalar to minimise, and the share of images whose nearest text is one of their own."""

    value: torch.Tensor  # ()
    accuracy: torch.Tensor  # () no gradient


class Pairs:
    """Which of the N texts belong to which of the B images of this process.

    Two pairs are equal if they have the same caption or the same image, that is, an equal number in a column. (The
    relation is symmetric but not transitive: A and B may share a caption, and B and C an image.)

    Args:
        pair_ids: (B, C) numbers of this process's pairs, or (B,).
        duplicates: What equal pairs count as: `positives`, `masked` or `negatives`.

    Raises:
        ConfigError: `duplicates` has another value.
    """

    def __init__(self, pair_ids: torch.Tensor, duplicates: str) -> None:
        check(duplicates in DUPLICATES, "loss.duplicates", duplicates, f"expected one of {', '.join(DUPLICATES)}")
        self.ids, self.mode = pair_ids.reshape(len(pair_ids), -1), duplicates
        self.everyone = distributed.gather(self.ids)  # (N, C)
        self.places = torch.arange(len(self.everyone), device=pair_ids.device)
        first = distributed.rank() * len(pair_ids)
        self.mine = slice(first, first + len(pair_ids))

    def matches(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the N pairs is the row's own (R, N), and which are equal to it (R, N)."""
        own = self.places[self.mine][rows, None] == self.places
        equal = own
        for column in range(self.ids.shape[1]):
            equal = equal | (self.ids[rows, None, column] == self.everyone[:, column])
        return own, equal

    def targets(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return which pairs are positives, which are equal, and which are ignored, each (R, N)."""
        own, equal = self.matches(rows)
        return equal if self.mode == "positives" else own, equal, equal & ~own if self.mode == "masked" else None

    def counts(self) -> torch.Tensor:
        """Return the number of positives of each of the N pairs, (N,)."""
        if self.mode != "positives":
            return torch.ones_like(self.places)
        first = self.everyone[:, 0]
        if self.everyone.shape[1] == 1:
            return _occurrences(first)
        second = self.everyone[:, 1]
        return _occurrences(first) + _occurrences(second) - _occurrences(self.everyone[:, :2])


def _occurrences(ids: torch.Tensor) -> torch.Tensor:
    """Return how often each of N numbers, or rows of numbers, occurs, (N,)."""
    _, place, count = ids.unique(dim=0, return_inverse=True, return_counts=True)
    occurrences: torch.Tensor = count[place]
    return occurrences


@torch.no_grad()
def accuracy(logits: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """Return whether the nearest text of each row belongs to that row, (R,)."""
    return equal.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1).float()


def infonce(embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str = "negatives") -> Loss:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3).

    Args:
        embeddings: B pairs of this process.
        pair_ids: (B, C) or (B,); pairs with an equal number in a column are equal.
        duplicates: "negatives": only the own pair is a positive. "positives": the target is spread evenly over all
            equal pairs. "masked": other equal pairs are ignored.
    """
    image, text, scale = embeddings[:3]
    image_logits = scale * image @ distributed.gather(text).T  # (B, N)
    text_logits = scale * text @ distributed.gather(image).T  # (B, N)
    pairs = Pairs(pair_ids, duplicates)
    own, equal = pairs.matches(slice(None))
    if duplicates == "masked":
        others = equal & ~own
        image_logits, text_logits = (x.masked_fill(others, float("-inf")) for x in (image_logits, text_logits))
    target = own.int().argmax(dim=1)
    if duplicates == "positives":
        target = equal / equal.sum(dim=1, keepdim=True)  # (B, N) probabilities instead of (B,) indices
    value = (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits, target)) / 2
    return Loss(value, accuracy(image_logits, equal).mean())


def sigmoid(embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str = "negatives") -> Loss:
    """Pairwise sigmoid loss over the global batch (Zhai et al. 2023, equation 1): a sum over pairs, divided by N.

    Args:
        embeddings: B pairs of this process, with a bias.
        pair_ids: As for `infonce`.
        duplicates: As for `infonce`; "positives" counts each equal pair as a separate match.

    Raises:
        ValueError: the embeddings have no bias.
    """
    image, text, scale, bias = with_bias(embeddings)
    logits = scale * image @ distributed.gather(text).T + bias  # (B, N)
    own, equal = Pairs(pair_ids, duplicates).matches(slice(None))
    positive = equal if duplicates == "positives" else own
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))  # (B, N)
    if duplicates == "masked":
        terms = terms.masked_fill(equal & ~own, 0.0)
    return Loss(terms.sum(dim=1).mean(), accuracy(logits, equal).mean())


def with_bias(embeddings: Embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, texts, scale and bias; raises a `ValueError` without a bias."""
    image, text, scale, bias = embeddings[:4]
    if bias is None:
        raise ValueError("the sigmoid loss needs a bias: build DualEncoder with losses.initial_bias(config)")
    return image, text, scale, bias


def distillation(embeddings: Embeddings, teacher: torch.Tensor, cosine: float, mse: float) -> torch.Tensor:
    """Return the weighted sum of two distances from texts to the teacher's features, means over B pairs.

    The targets are the source CLIP's text features of the translation, as in M-CLIP (Carlsson et al. 2022) and AltCLIP
    (Chen et al. 2022). The contrastive term, with the teacher's embeddings instead of images, is in
    `losses.build_loss`.

    Args:
        embeddings: With `text` (B, D) and `text_norm` (B,).
        teacher: (B, D) features, not normalised.
        cosine: Weight of 1 - cosine similarity.
        mse: Weight of the mean squared error of the features before normalisation.
    """
    value = torch.zeros((), device=teacher.device)
    if cosine:
        value = value + cosine * (1 - F.cosine_similarity(embeddings.text, teacher, dim=-1)).mean()
    if mse:
        assert embeddings.text_norm is not None, "mse needs the norms of the text features"
        features = embeddings.text * embeddings.text_norm.unsqueeze(-1)
        value = value + mse * F.mse_loss(features, teacher)
    return value
