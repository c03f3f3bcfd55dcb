"""Preservation: a term that keeps what the source of an alignment could do."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from koclip import distributed
from koclip.losses.contrastive import Embeddings


class SourcePairs(NamedTuple):
    """The source's embeddings of B pairs of this process, and which of the pairs it can read."""

    image: torch.Tensor  # (B, D) unit norm
    text: torch.Tensor  # (B, D) unit norm
    readable: torch.Tensor  # (B,) bool: the caption is in the source's language


def preservation(embeddings: Embeddings, source: SourcePairs, tile_rows: int) -> torch.Tensor:
    """Return how far the model's similarities of images and texts are from the source's, over the readable pairs.

    With the source's similarities S0 and the model's S, both times the logit scale, and P = softmax over a row:

        mean over rows of KL(P(S0) || P(S)),

    averaged over both directions, image to text and text to image. It is 0 if nothing has changed. Its gradient is that
    of the cross-entropy of ZSCL (Zheng et al. 2023, equations 2 and 3), which applies learning without forgetting (Li
    and Hoiem 2016) to CLIP. The logit scale is a constant here.

    Args:
        embeddings: B pairs of this process. The rows are compared with the readable pairs of all processes.
        source: The source's embeddings of the same pairs.
        tile_rows: Rows of the similarities in memory at a time. The backward pass computes them again.

    Returns:
        This process's share (): the mean over the processes is the value.
    """
    readable = distributed.gather(source.readable)
    count = int(readable.sum())
    if not count:
        return embeddings.text.new_zeros(())
    scale = embeddings.logit_scale.detach()
    total = embeddings.text.new_zeros(())
    sides = ((embeddings.image, source.image), (embeddings.text, source.text))
    for (rows, source_rows), (columns, source_columns) in (sides, sides[::-1]):
        everyone, source_everyone = (distributed.gather(part)[readable] for part in (columns, source_columns))  # (M, D)
        own, source_own = scale * rows[source.readable], scale * source_rows[source.readable]  # (R, D)
        # At least one tile, without rows: every process must take part in the backward pass of `gather`.
        for start in range(0, max(1, len(own)), tile_rows):
            tile = slice(start, start + tile_rows)
            tensors = own[tile], source_own[tile], everyone, source_everyone
            if len(own) <= tile_rows:
                total = total + _divergence(*tensors)
            else:
                total = total + checkpoint(_divergence, *tensors, use_reentrant=False)
    return total * distributed.world_size() / (2 * count)


def _divergence(
    rows: torch.Tensor, source_rows: torch.Tensor, columns: torch.Tensor, source_columns: torch.Tensor
) -> torch.Tensor:
    """Return the sum over rows (R, D) of KL(source || model) of the softmax over columns (M, D)."""
    logits = F.log_softmax(rows @ columns.T, dim=1)  # (R, M)
    source_logits = F.log_softmax(source_rows @ source_columns.T, dim=1)
    return F.kl_div(logits, source_logits, reduction="sum", log_target=True)
