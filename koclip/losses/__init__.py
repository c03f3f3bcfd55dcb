"""Contrastive losses and distillation: embeddings in, a scalar out. No model, no data set.

Each process computes the rows of its own pairs against the gathered global batch. Averaging gradients over processes,
as DDP does, then gives exactly the gradient of the loss over the global batch.

Letters in shape comments: B pairs per process, N pairs in the global batch, R rows of a tile, D embedding width.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from koclip import distributed
from koclip.config import DistillConfig, LossConfig, check
from koclip.losses.contrastive import CAPTION, IMAGE, SENTENCE, Embeddings, Loss, distillation, infonce, sigmoid
from koclip.losses.preservation import SourcePairs, preservation
from koclip.losses.tiled import InfoNCERows, Rows, SigmoidRows, tiled

TILE_SIZE = {"cpu": 2**20, "cuda": 2**26}  # similarities in memory at a time
MIN_TILE_ROWS = 64  # products of fewer rows are slow

__all__ = ["CONTRASTIVE", "Contrastive", "Loss", "LossFn", "build_loss", "infonce", "initial_bias", "sigmoid", "tiled"]


class Contrastive(NamedTuple):
    """A contrastive loss. A new loss needs its file and an entry of `CONTRASTIVE`, nothing else."""

    dense: Callable[[Embeddings, torch.Tensor, str], Loss]  # of embeddings, pair_ids, duplicates
    rows: type[Rows] | None = None  # tiled form; None: the loss needs all similarities at once
    initial_bias: float | None = None  # of a learned bias of the logits; None: no bias


CONTRASTIVE = {
    "infonce": Contrastive(infonce, InfoNCERows),
    "sigmoid": Contrastive(sigmoid, SigmoidRows, initial_bias=-10.0),  # Zhai et al. 2023, section 3.2
}


class LossFn(Protocol):
    """The loss of B pairs of this process."""

    def __call__(
        self,
        embeddings: Embeddings,
        pair_ids: torch.Tensor,
        teacher: torch.Tensor | None = None,
        readable: torch.Tensor | None = None,
        source_image: torch.Tensor | None = None,
    ) -> Loss:
        """Return the loss.

        `pair_ids` (B, 3) are equal for equal captions, images and sentences of the teacher, in this order; (B, 2)
        without a teacher, (B,) if images never repeat. `teacher` (B, D) are its features, not normalised. `readable`
        (B,) bool: the caption is in the teacher's language. `source_image` (B, D) are the source's image embeddings;
        None if the image tower is frozen, so that they are the model's.
        """


def build_loss(config: LossConfig, distill: DistillConfig | None = None, images: bool = True) -> LossFn:
    """Return the loss that a configuration names.

    Args:
        config: The contrastive loss.
        distill: Weights of the terms that compare with the teacher; None without a teacher.
        images: Contrast texts with images. If false, the loss is only the teacher's terms.

    Raises:
        ConfigError: no loss has that name, or it has no tiled form and `tile_rows` is set.
    """
    _named(config)

    def loss(
        embeddings: Embeddings,
        pair_ids: torch.Tensor,
        teacher: torch.Tensor | None = None,
        readable: torch.Tensor | None = None,
        source_image: torch.Tensor | None = None,
    ) -> Loss:
        ids = pair_ids.reshape(len(pair_ids), -1)
        pairs = ids[:, [CAPTION, IMAGE]] if ids.shape[1] > 1 else ids
        contrast = _contrast(config, embeddings, pairs) if images else None
        if distill is None:
            assert contrast is not None
            return contrast
        if teacher is None:
            raise ValueError("the batches have no teacher's features, which distillation needs")
        if contrast is None:
            return _teach(config, distill, embeddings, ids, teacher)
        value = contrast.value
        if distill.anchor:
            value = value + distill.anchor * _teach(config, distill, embeddings, ids, teacher).value
        if distill.preserve:
            if readable is None:
                raise ValueError("the batches do not say which captions the source can read, which preservation needs")
            image = embeddings.image.detach() if source_image is None else source_image
            source = SourcePairs(image, torch.nn.functional.normalize(teacher, dim=-1), readable)
            value = value + distill.preserve * preservation(embeddings, source, _tile_rows(config, ids))
        return Loss(value, contrast.accuracy)

    return loss


def initial_bias(config: LossConfig) -> float | None:
    """Return the initial bias of the logits; None for losses without a bias.

    Raises:
        ConfigError: no loss has that name, or it has no tiled form and `tile_rows` is set.
    """
    return _named(config).initial_bias


def _named(config: LossConfig) -> Contrastive:
    """Return the loss that a configuration names, and check its settings."""
    check(config.name in CONTRASTIVE, "loss.name", config.name, f"expected one of {', '.join(CONTRASTIVE)}")
    contrastive = CONTRASTIVE[config.name]
    tiles = config.tile_rows is None or contrastive.rows is not None
    check(tiles, "loss.tile_rows", config.tile_rows, f"{config.name} has no tiled form; remove this setting")
    return contrastive


def _teach(
    config: LossConfig, distill: DistillConfig, embeddings: Embeddings, ids: torch.Tensor, teacher: torch.Tensor
) -> Loss:
    """Return the teacher's terms, and the share of its sentences whose nearest text is one of their own."""
    value = distillation(embeddings, teacher, distill.cosine, distill.mse)
    teacher_as_image = embeddings._replace(image=torch.nn.functional.normalize(teacher, dim=-1))
    contrast = _contrast(config, teacher_as_image, ids[:, [CAPTION, SENTENCE]])
    return Loss(value + distill.contrastive * contrast.value if distill.contrastive else value, contrast.accuracy)


def _contrast(config: LossConfig, embeddings: Embeddings, ids: torch.Tensor) -> Loss:
    """Return the contrastive loss: dense if it has no tiled form or one tile is enough, else in tiles."""
    contrastive, num_rows = CONTRASTIVE[config.name], len(ids)
    tile_rows = _tile_rows(config, ids)
    if contrastive.rows is None or tile_rows >= num_rows:
        return contrastive.dense(embeddings, ids, config.duplicates)
    return tiled(contrastive.rows, embeddings, ids, config.duplicates, tile_rows)


def _tile_rows(config: LossConfig, ids: torch.Tensor) -> int:
    """Return the rows of the similarities (B, N) to have in memory at a time."""
    size = TILE_SIZE["cpu" if ids.device.type == "cpu" else "cuda"]
    return config.tile_rows or max(MIN_TILE_ROWS, size // (len(ids) * distributed.world_size()))
