"""What a loss is computed from."""

from typing import NamedTuple

import torch


class Embeddings(NamedTuple):
    """A batch in the shared space."""

    image: torch.Tensor  # (B, D) unit norm; (B, 0) in batches without images
    text: torch.Tensor  # (B, D) unit norm
    logit_scale: torch.Tensor  # () already exponentiated: the inverse temperature
    logit_bias: torch.Tensor | None = None  # () of the sigmoid loss
    text_norm: torch.Tensor | None = None  # (B,) of the texts' features before they were normalised
