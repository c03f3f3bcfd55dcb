"""The contrastive losses as their papers write them, all similarities at once, and distances to a teacher.

`Embeddings` is what a loss is computed from, `Pairs` says which pairs of a batch belong together, `Loss` is the result.
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
    logit_bias: torch.Tensor | None = None  # () added to the logits, of losses that start from a bias
    text_norm: torch.Tensor | None = None  # (B,) of the text features before normalisation


class Loss(NamedTuple):
    """What a loss returns: the scalar to minimise, and the share of images whose best text is one of their own."""

    value: torch.Tensor  # ()
    accuracy: torch.Tensor  # () no gradient


class Pairs:
    """Which of the N texts belong to which of the B images of this process.

    Two pairs are equal if they have the same caption or the same image, that is, an equal number in one column. (This
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
        """Return which of N pairs is each row's own (R, N), and which are equal to it (R, N)."""
        own = self.places[self.mine][rows, None] == self.places
        equal = own
        for column in range(self.ids.shape[1]):
            equal = equal | (self.ids[rows, None, column] == self.everyone[:, column])
        return own, equal

    def targets(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what counts as right, what is equal, and what takes no part, each (R, N)."""
        own, equal = self.matches(rows)
        return equal if self.mode == "positives" else own, equal, equal & ~own if self.mode == "masked" else None

    def counts(self) -> torch.Tensor:
        """Return how many pairs count as right for each of the N, (N,)."""
        if self.mode != "positives":
            return torch.ones_like(self.places)
        first = self.everyone[:, 0]
        if self.everyone.shape[1] == 1:
            return _occurrences(first)
        second = self.everyone[:, 1]
        return _occurrences(first) + _occurrences(second) - _occurrences(self.everyone[:, :2])


def _occurrences(ids: torch.Tensor) -> torch.Tensor:
    """Return how often each of N numbers, or rows of numbers, occurs among them, (N,)."""
    _, place, count = ids.unique(dim=0, return_inverse=True, return_counts=True)
    occurrences: torch.Tensor = count[place]
    return occurrences


@torch.no_grad()
def accuracy(logits: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """Return whether the best text of each row is one of its own, (R,)."""
    best = logits.argmax(dim=1, keepdim=True)
    return equal.gather(1, best).squeeze(1).float()


def infonce(embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str = "negatives") -> Loss:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3).

    Args:
        embeddings: B pairs of this process.
        pair_ids: (B, C) or (B,); pairs with an equal number in a column are equal.
        duplicates: "negatives": only the own pair is right. "positives": the target is spread evenly over all
            equal pairs. "masked": those other pairs take no part.
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
        target = equal / equal.sum(dim=1, keepdim=True)  # (B, N) shares instead of (B,) places
    value = (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits, target)) / 2
    return Loss(value, accuracy(image_logits, equal).mean())


def sigmoid(embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str = "negatives") -> Loss:
    """Pairwise sigmoid loss over the global batch (Zhai et al. 2023, equation 1): a sum over pairs, divided by N.

    Args:
        embeddings: B pairs of this process, with the loss's bias.
        pair_ids: As for `infonce`.
        duplicates: As for `infonce`; "positives" counts each equal pair as a match of its own.

    Raises:
        ValueError: there is no bias.
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
    """Return images, texts, scale and bias.

    Raises:
        ValueError: there is no bias.
    """
    image, text, scale, bias = embeddings[:4]
    if bias is None:
        raise ValueError("the sigmoid loss needs a bias: build DualEncoder with losses.initial_bias(config)")
    return image, text, scale, bias


def distillation(embeddings: Embeddings, teacher: torch.Tensor, cosine: float, mse: float) -> torch.Tensor:
    """Return the weighted sum of two distances from texts to the teacher's features, means over B pairs.

    The targets are the source CLIP's text features of the English translation of a sentence, as in M-CLIP (Carlsson et
    al. 2022) and AltCLIP (Chen et al. 2022). A third way is the contrastive loss with the teacher's embeddings in the
    place of images (`losses.build_loss`).

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
        assert embeddings.text_norm is not None, "the texts' features before normalisation are needed"
        features = embeddings.text * embeddings.text_norm.unsqueeze(-1)
        value = value + mse * F.mse_loss(features, teacher)
    return value
