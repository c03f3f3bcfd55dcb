"""Contrastive losses: embeddings in, a scalar out. No model, no data set.

Each process computes the rows of its own pairs against the gathered global batch. Averaging gradients over processes,
as DDP does, then gives exactly the gradient of the loss over the global batch.

Letters in shape comments: B pairs per process, N pairs in the global batch, R rows of a tile, D embedding width.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from koclip import distributed
from koclip.config import LossConfig
from koclip.models.dual_encoder import Embeddings

SIGMOID_BIAS = -10.0  # initial bias of the sigmoid loss (Zhai et al. 2023, section 3.2)
TILE_SIZE = {"cpu": 2**20, "cuda": 2**26}  # similarities in memory at a time, but
MIN_TILE_ROWS = 64  # rows at least: thinner products are slow


class Loss(NamedTuple):
    """What a loss returns: the scalar to minimise and the share of images whose best text is theirs."""

    value: torch.Tensor  # ()
    accuracy: torch.Tensor  # () no gradient


LossFn = Callable[[Embeddings, torch.Tensor], Loss]


def build(config: LossConfig) -> LossFn:
    """Return the loss that a configuration names; it takes embeddings and caption ids (B,)."""
    dense = {"infonce": infonce, "sigmoid": sigmoid}[config.name]

    def loss(embeddings: Embeddings, caption_ids: torch.Tensor) -> Loss:
        rows = len(caption_ids)
        size = TILE_SIZE["cpu" if embeddings.image.device.type == "cpu" else "cuda"]
        tile_rows = config.tile_rows or max(MIN_TILE_ROWS, size // (rows * distributed.world_size()))
        if tile_rows >= rows:
            return dense(embeddings, caption_ids, config.equal_captions)
        return tiled(config.name, embeddings, caption_ids, config.equal_captions, tile_rows)

    return loss


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
    pairs = _Pairs(caption_ids, equal_captions)
    own, equal = pairs.matches(slice(None))
    if equal_captions == "masked":
        others = equal & ~own
        image_logits, text_logits = (x.masked_fill(others, float("-inf")) for x in (image_logits, text_logits))
    target = own.int().argmax(dim=1)
    if equal_captions == "positives":
        target = equal / equal.sum(dim=1, keepdim=True)  # (B, N) shares instead of (B,) places
    value = (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits, target)) / 2
    return Loss(value, _accuracy(image_logits, equal).mean())


def sigmoid(embeddings: Embeddings, caption_ids: torch.Tensor, equal_captions: str = "negatives") -> Loss:
    """Pairwise sigmoid loss over the global batch (Zhai et al. 2023, equation 1): a sum over pairs, divided by N.

    Args:
        embeddings: B pairs of this process, with the loss's bias.
        caption_ids: (B,) equal for equal captions.
        equal_captions: As for `infonce`; "positives" counts each pair of equal captions as a match of its own.

    Raises:
        ValueError: there is no bias.
    """
    image, text, scale, bias = _with_bias(embeddings)
    logits = scale * image @ distributed.gather(text).T + bias  # (B, N)
    own, equal = _Pairs(caption_ids, equal_captions).matches(slice(None))
    positive = equal if equal_captions == "positives" else own
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))  # (B, N)
    if equal_captions == "masked":
        terms = terms.masked_fill(equal & ~own, 0.0)
    return Loss(terms.sum(dim=1).mean(), _accuracy(logits, equal).mean())


def tiled(name: str, embeddings: Embeddings, caption_ids: torch.Tensor, equal_captions: str, tile_rows: int) -> Loss:
    """Return `infonce` or `sigmoid` with memory linear in N: `tile_rows` rows of similarities exist at a time.

    A tile is computed again in the backward pass, of which only the embeddings and a few numbers per pair are kept.
    InfoNCE needs each similarity once, not once per direction: the sum over a column is carried along from tile to
    tile and over the processes (an online softmax, Milakov and Gimelshein 2018).

    The value is this process's share: the mean over processes is the loss. The gradients are those of the dense loss
    if all processes scale theirs alike.
    """
    image, text, scale, bias = _with_bias(embeddings) if name == "sigmoid" else embeddings._replace(logit_bias=None)
    pairs = _Pairs(caption_ids, equal_captions)
    objective = _SigmoidRows(pairs) if name == "sigmoid" else _InfoNCERows(pairs)
    value = _Tiled.apply(image, distributed.gather(text), scale, bias, objective, tile_rows)
    return Loss(value, objective.accuracy / len(caption_ids))


def _with_bias(embeddings: Embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    image, text, scale, bias = embeddings
    if bias is None:
        raise ValueError("the sigmoid loss needs a bias: build the DualEncoder with losses.initial_bias(config)")
    return image, text, scale, bias


class _Pairs:
    """Which of the N texts belong to which of the B images of this process."""

    def __init__(self, caption_ids: torch.Tensor, equal_captions: str) -> None:
        self.caption_ids, self.mode = caption_ids, equal_captions
        self.everyone = distributed.gather(caption_ids)  # (N,)
        self.places = torch.arange(len(self.everyone), device=caption_ids.device)
        first = distributed.rank() * len(caption_ids)
        self.mine = slice(first, first + len(caption_ids))

    def matches(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of N pairs is each row's own (R, N), and which have its caption (R, N)."""
        own = self.places[self.mine][rows, None] == self.places
        return own, self.caption_ids[rows, None] == self.everyone

    def targets(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what counts as right, what has the same caption, and what takes no part, each (R, N)."""
        own, equal = self.matches(rows)
        return equal if self.mode == "positives" else own, equal, equal & ~own if self.mode == "masked" else None


class _InfoNCERows:
    """InfoNCE of tiles of rows: log-sums over rows and columns first, gradients of the logits when these are known."""

    def __init__(self, pairs: _Pairs) -> None:
        device = pairs.places.device
        self.pairs, self.accuracy = pairs, torch.zeros((), device=device)
        # Made once and written in place: small results kept between large tiles would fragment the heap.
        self._matched, self._row_sums = torch.empty(2, len(pairs.caption_ids), device=device)  # (B,) each
        self._columns = torch.full(pairs.places.shape, float("-inf"), device=device)  # (N,)

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        right, equal, ignored = self.pairs.targets(rows)
        self._matched[rows] = torch.where(right, logits, 0).sum(dim=1) / right.sum(dim=1)
        if ignored is not None:
            logits.masked_fill_(ignored, float("-inf"))
        self._row_sums[rows] = logits.logsumexp(dim=1)
        torch.logaddexp(self._columns, logits.logsumexp(dim=0), out=self._columns)
        self.accuracy += _accuracy(logits, equal).sum()

    def value(self) -> torch.Tensor:
        self._columns = distributed.logsumexp(self._columns)
        value: torch.Tensor = (self._row_sums + self._columns[self.pairs.mine]) / 2 - self._matched
        return value.mean()

    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        right, _, ignored = self.pairs.targets(rows)
        if ignored is not None:
            logits.masked_fill_(ignored, float("-inf"))
        gradient: torch.Tensor = (logits - self._row_sums[rows, None]).exp_()
        gradient += logits.sub_(self._columns).exp_()
        gradient /= 2
        return gradient.sub_(right / right.sum(dim=1, keepdim=True))


class _SigmoidRows:
    """The sigmoid loss of tiles of rows."""

    def __init__(self, pairs: _Pairs) -> None:
        self.pairs, self.accuracy = pairs, torch.zeros((), device=pairs.places.device)
        self._total = torch.zeros((), device=pairs.places.device)

    def add(self, rows: slice, logits: torch.Tensor) -> None:
        right, equal, ignored = self.pairs.targets(rows)
        terms = -F.logsigmoid(torch.where(right, logits, -logits))
        self._total += (terms if ignored is None else terms.masked_fill_(ignored, 0)).sum()
        self.accuracy += _accuracy(logits, equal).sum()

    def value(self) -> torch.Tensor:
        return self._total / len(self.pairs.caption_ids)

    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        right, _, ignored = self.pairs.targets(rows)
        gradient = logits.sigmoid_().sub_(right.to(logits.dtype))
        return gradient if ignored is None else gradient.masked_fill_(ignored, 0)


class _Tiled(torch.autograd.Function):
    """An objective over logits = scale * image @ texts.T + bias, a tile of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,  # (B, D)
        texts: torch.Tensor,  # (N, D)
        scale: torch.Tensor,  # ()
        bias: torch.Tensor | None,  # ()
        objective: _InfoNCERows | _SigmoidRows,
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


@torch.no_grad()
def _accuracy(logits: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """Return whether the best text of each row has its caption, (R,)."""
    best = logits.argmax(dim=1, keepdim=True)
    return equal.gather(1, best).squeeze(1).float()
