"""Contrastive losses and distillation: embeddings in, a scalar out. No model, no data set.

Each process computes the rows of its own pairs against the gathered global batch. Averaging gradients over processes,
as DDP does, then gives exactly the gradient of the loss over the global batch.

Letters in shape comments: B pairs per process, N pairs in the global batch, R rows of a tile, D embedding width.
"""

from typing import Protocol

import torch

from koclip import distributed
from koclip.config import DistillConfig, LossConfig, check
from koclip.losses.contrastive import infonce, sigmoid
from koclip.losses.distillation import distillation
from koclip.losses.embeddings import Embeddings
from koclip.losses.pairs import CAPTION, IMAGE, SENTENCE, Loss
from koclip.losses.tiled import tiled

DENSE = {"infonce": infonce, "sigmoid": sigmoid}
SIGMOID_BIAS = -10.0  # initial bias of the sigmoid loss (Zhai et al. 2023, section 3.2)
TILE_SIZE = {"cpu": 2**20, "cuda": 2**26}  # similarities in memory at a time, but
MIN_TILE_ROWS = 64  # rows at least: thinner products are slow

__all__ = ["Loss", "LossFn", "build", "infonce", "initial_bias", "sigmoid", "tiled"]


class LossFn(Protocol):
    """The loss of B pairs of this process."""

    def __call__(self, embeddings: Embeddings, pair_ids: torch.Tensor, teacher: torch.Tensor | None = None) -> Loss:
        """Return it.

        Args:
            embeddings: What the model made of the pairs.
            pair_ids: (B, 3) numbers that are equal for equal captions, images and teacher's sentences, in this order;
                (B, 2) or (B,) where there is nothing to tell apart by the others.
            teacher: (B, D) the teacher's features of the sentences, not normalised.
        """


def build(config: LossConfig, distill: DistillConfig | None = None, images: bool = True) -> LossFn:
    """Return the loss that a configuration names.

    Args:
        config: The contrastive loss.
        distill: What the teacher adds; None without a teacher.
        images: Contrast texts with images. Without, the teacher's terms are all of the loss.

    Raises:
        ConfigError: there is no loss of that name.
    """
    check(config.name in DENSE, "loss.name", config.name, f"expected one of {', '.join(DENSE)}")

    def loss(embeddings: Embeddings, pair_ids: torch.Tensor, teacher: torch.Tensor | None = None) -> Loss:
        ids = pair_ids.reshape(len(pair_ids), -1)
        made = _contrast(config, embeddings, ids[:, [CAPTION, IMAGE]] if ids.shape[1] > 1 else ids) if images else None
        if distill is None:
            assert made is not None
            return made
        if teacher is None:
            raise ValueError("distillation needs the teacher's features: the batches have none")
        value, accuracy = _teach(config, distill, embeddings, ids, teacher)
        return Loss(value, accuracy) if made is None else Loss(made.value + distill.anchor * value, made.accuracy)

    return loss


def _teach(
    config: LossConfig, distill: DistillConfig, embeddings: Embeddings, ids: torch.Tensor, teacher: torch.Tensor
) -> Loss:
    """Return what the teacher adds, and the share of its sentences whose best text is theirs."""
    value = distillation(embeddings, teacher, distill.cosine, distill.mse)
    in_place_of_images = embeddings._replace(image=torch.nn.functional.normalize(teacher, dim=-1))
    contrast = _contrast(config, in_place_of_images, ids[:, [CAPTION, SENTENCE]])
    return Loss(value + distill.contrastive * contrast.value if distill.contrastive else value, contrast.accuracy)


def _contrast(config: LossConfig, embeddings: Embeddings, ids: torch.Tensor) -> Loss:
    """Return the contrastive loss, dense while its similarities are few, else in tiles."""
    rows = len(ids)
    size = TILE_SIZE["cpu" if ids.device.type == "cpu" else "cuda"]
    tile_rows = config.tile_rows or max(MIN_TILE_ROWS, size // (rows * distributed.world_size()))
    if tile_rows >= rows:
        return DENSE[config.name](embeddings, ids, config.duplicates)
    return tiled(config.name, embeddings, ids, config.duplicates, tile_rows)


def initial_bias(config: LossConfig) -> float | None:
    """Return the bias that the loss starts from, None for losses without one."""
    return SIGMOID_BIAS if config.name == "sigmoid" else None
