"""What a loss is computed from, which pairs of a batch belong together, and what every loss returns."""

from typing import NamedTuple

import torch

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
