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
from koclip.losses.tiled import InfoNCERows, Rows, SigmoidRows, tiled

TILE_SIZE = {"cpu": 2**20, "cuda": 2**26}  # similarities in memory at a time, but
MIN_TILE_ROWS = 64  # rows at least: thinner products are slow

__all__ = ["CONTRASTIVE", "Contrastive", "Loss", "LossFn", "build_loss", "infonce", "initial_bias", "sigmoid", "tiled"]


class Contrastive(NamedTuple):
    """A contrastive loss. An entry of `CONTRASTIVE` is all that a new loss needs, besides its file."""

    dense: Callable[[Embeddings, torch.Tensor, str], Loss]  # embeddings, pair_ids, duplicates
    rows: type[Rows] | None = None  # its tiled form; None: it needs all similarities at once
    initial_bias: float | None = None  # initial value of a learned bias of the logits; None: it has no bias


CONTRASTIVE = {
    "infonce": Contrastive(infonce, InfoNCERows),
    "sigmoid": Contrastive(sigmoid, SigmoidRows, initial_bias=-10.0),  # Zhai et al. 2023, section 3.2
}


class LossFn(Protocol):
    """The loss of B pairs of this process."""

    def __call__(self, embeddings: Embeddings, pair_ids: torch.Tensor, teacher: torch.Tensor | None = None) -> Loss:
        """Return the loss.

        Args:
            embeddings: The pairs in the shared space.
            pair_ids: (B, 3) numbers that are equal for equal captions, images and sentences of the teacher, in this
                order. (B, 2) without a teacher, (B,) if images never repeat.
            teacher: (B, D) the teacher's features of the sentences, not normalised.
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

    def loss(embeddings: Embeddings, pair_ids: torch.Tensor, teacher: torch.Tensor | None = None) -> Loss:
        ids = pair_ids.reshape(len(pair_ids), -1)
        contrast = _with_images(config, embeddings, ids) if images else None
        if distill is None:
            assert contrast is not None
            return contrast
        if teacher is None:
            raise ValueError("distillation needs the teacher's features: the batches have none")
        value, accuracy = _teach(config, distill, embeddings, ids, teacher)
        if contrast is None:
            return Loss(value, accuracy)
        return Loss(contrast.value + distill.anchor * value, contrast.accuracy)

    return loss


def initial_bias(config: LossConfig) -> float | None:
    """Return the initial bias of the logits; None for losses without a bias.

    Raises:
        ConfigError: no loss has that name, or it has no tiled form and `tile_rows` is set.
    """
    return _named(config).initial_bias


def _named(config: LossConfig) -> Contrastive:
    """Return the loss that a configuration names, if it can do what the configuration asks for."""
    check(config.name in CONTRASTIVE, "loss.name", config.name, f"expected one of {', '.join(CONTRASTIVE)}")
    contrastive = CONTRASTIVE[config.name]
    tiles = config.tile_rows is None or contrastive.rows is not None
    check(tiles, "loss.tile_rows", config.tile_rows, f"{config.name} has no tiled form; leave the key out")
    return contrastive


def _with_images(config: LossConfig, embeddings: Embeddings, ids: torch.Tensor) -> Loss:
    """Return the contrastive loss between texts and images."""
    return _contrast(config, embeddings, ids[:, [CAPTION, IMAGE]] if ids.shape[1] > 1 else ids)


def _teach(
    config: LossConfig, distill: DistillConfig, embeddings: Embeddings, ids: torch.Tensor, teacher: torch.Tensor
) -> Loss:
    """Return the teacher's terms, and the share of its sentences whose best text is their own."""
    value = distillation(embeddings, teacher, distill.cosine, distill.mse)
    in_place_of_images = embeddings._replace(image=torch.nn.functional.normalize(teacher, dim=-1))
    contrast = _contrast(config, in_place_of_images, ids[:, [CAPTION, SENTENCE]])
    return Loss(value + distill.contrastive * contrast.value if distill.contrastive else value, contrast.accuracy)


def _contrast(config: LossConfig, embeddings: Embeddings, ids: torch.Tensor) -> Loss:
    """Return the contrastive loss: dense if it has no tiled form or its similarities are few, else in tiles."""
    contrastive, num_rows = CONTRASTIVE[config.name], len(ids)
    size = TILE_SIZE["cpu" if ids.device.type == "cpu" else "cuda"]
    tile_rows = config.tile_rows or max(MIN_TILE_ROWS, size // (num_rows * distributed.world_size()))
    if contrastive.rows is None or tile_rows >= num_rows:
        return contrastive.dense(embeddings, ids, config.duplicates)
    return tiled(contrastive.rows, embeddings, ids, config.duplicates, tile_rows)
