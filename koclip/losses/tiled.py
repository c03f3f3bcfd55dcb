"""The contrastive losses in tiles: equal to the dense losses, with memory linear in the number of pairs."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from koclip import distributed
from koclip.losses.contrastive import Embeddings, Loss, Pairs, accuracy, with_bias


class Rows(Protocol):
    """A loss that is computed from a few rows of the similarities at a time.

    `add` is called with every tile once, then `value`, then `gradient` with every tile again.
    """

    has_bias: bool
    accuracy: torch.Tensor  # () number of images, of all added rows, whose nearest text is one of their own

    def __init__(self, pairs: Pairs) -> None:
        """Start without rows."""

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        """Add the logits (R, N) of some rows. It may overwrite them."""

    def value(self) -> torch.Tensor:
        """Return the loss of this process's rows, ()."""

    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """Return the gradient of B times the loss with respect to the logits, (R, N). It may overwrite them."""


def tiled(
    objective: type[Rows], embeddings: Embeddings, pair_ids: torch.Tensor, duplicates: str, tile_rows: int
) -> Loss:
    """Return a contrastive loss with memory linear in N: `tile_rows` rows of similarities exist at a time.

    The backward pass recomputes each tile, so that only the embeddings and a few numbers per pair are stored. InfoNCE
    needs each similarity once, not once per direction: the sums over columns are accumulated over tiles and processes
    (an online softmax, Milakov and Gimelshein 2018).

    The value is this process's share: the mean over processes is the loss. The gradients equal those of the dense loss
    if all processes scale their shares equally.
    """
    rows = objective(Pairs(pair_ids, duplicates))
    image, text, scale, bias = with_bias(embeddings) if rows.has_bias else (*embeddings[:3], None)
    value = _Tiled.apply(image, distributed.gather(text), scale, bias, rows, tile_rows)
    return Loss(value, rows.accuracy / len(pair_ids))


class InfoNCERows:
    """InfoNCE in tiles: first the log-sums over rows and columns, then the gradients of the logits."""

    has_bias = False

    def __init__(self, pairs: Pairs) -> None:
        device = pairs.places.device
        self.pairs, self.accuracy = pairs, torch.zeros((), device=device)
        counts = pairs.counts()
        self._mine, self._everyone = 1 / counts[pairs.mine], 1 / counts  # weight of each match in a row and a column
        # Allocated once and written in place: small tensors between large tiles would fragment the heap.
        self._matched, self._row_sums = torch.empty(2, len(pairs.ids), device=device)  # (B,) each
        self._columns = torch.full(pairs.places.shape, float("-inf"), device=device)  # (N,)

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        """Add to the sums over rows and columns."""
        right, equal, ignored = self.pairs.targets(rows)
        self._matched[rows] = (self._weights(rows, right) * logits).sum(dim=1)
        if ignored is not None:
            logits.masked_fill_(ignored, float("-inf"))
        self._row_sums[rows] = logits.logsumexp(dim=1)
        torch.logaddexp(self._columns, logits.logsumexp(dim=0), out=self._columns)
        self.accuracy += accuracy(logits, equal).sum()

    def value(self) -> torch.Tensor:
        """Add the sums over columns of all processes, and return the loss, ()."""
        self._columns = distributed.logsumexp(self._columns)
        value: torch.Tensor = (self._row_sums + self._columns[self.pairs.mine]) / 2 - self._matched
        return value.mean()

    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """Return the mean of both softmaxes minus the targets, (R, N)."""
        right, _, ignored = self.pairs.targets(rows)
        if ignored is not None:
            logits.masked_fill_(ignored, float("-inf"))
        gradient: torch.Tensor = (logits - self._row_sums[rows, None]).exp_()
        gradient += logits.sub_(self._columns).exp_()
        gradient /= 2
        return gradient.sub_(self._weights(rows, right))

    def _weights(self, rows: slice, right: torch.Tensor) -> torch.Tensor:
        """Return the weight of each positive (R, N): the mean of its share of the row and of the column."""
        return right * (self._mine[rows, None] + self._everyone) / 2


class SigmoidRows:
    """The sigmoid loss in tiles of rows."""

    has_bias = True

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.accuracy = pairs, torch.zeros((), device=pairs.places.device)
        self._total = torch.zeros((), device=pairs.places.device)

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        """Add to the sum over all pairs."""
        right, equal, ignored = self.pairs.targets(rows)
        terms = -F.logsigmoid(torch.where(right, logits, -logits))
        self._total += (terms if ignored is None else terms.masked_fill_(ignored, 0)).sum()
        self.accuracy += accuracy(logits, equal).sum()

    def value(self) -> torch.Tensor:
        """Return the loss, ()."""
        return self._total / len(self.pairs.ids)

    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid minus the targets, (R, N)."""
        right, _, ignored = self.pairs.targets(rows)
        gradient = logits.sigmoid_().sub_(right.to(logits.dtype))
        return gradient if ignored is None else gradient.masked_fill_(ignored, 0)


class _Tiled(torch.autograd.Function):
    """A loss of logits = scale * image @ texts.T + bias, one tile at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,  # (B, D)
        texts: torch.Tensor,  # (N, D)
        scale: torch.Tensor,  # ()
        bias: torch.Tensor | None,  # ()
        objective: Rows,
        tile_rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(image, texts, scale, bias)
        ctx.objective, ctx.tile_rows = objective, tile_rows
        for rows, logits in _tiles(image, texts, scale, bias, tile_rows):
            objective.add(rows, logits)
        return objective.value()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, texts, scale, bias = ctx.saved_tensors
        factor = gradients[0] / len(image)
        to_image, to_texts = torch.empty_like(image), torch.zeros_like(texts)
        to_bias = None if bias is None else torch.zeros_like(bias)
        for rows, logits in _tiles(image, texts, scale, bias, ctx.tile_rows):
            to_logits = ctx.objective.gradient(rows, logits).mul_(factor)  # (R, N)
            torch.mm(to_logits, texts, out=to_image[rows])
            to_texts.addmm_(to_logits.T, image[rows])
            if to_bias is not None:
                to_bias += to_logits.sum()
        to_scale = (to_image * image).sum()
        return to_image.mul_(scale), to_texts.mul_(scale), to_scale, to_bias, None, None


def _tiles(
    image: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, tile_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows and their logits (R, N), which the caller may overwrite."""
    for start in range(0, len(image), tile_rows):
        rows = slice(start, start + tile_rows)
        logits = scale * image[rows] @ texts.T
        yield rows, logits if bias is None else logits.add_(bias)
