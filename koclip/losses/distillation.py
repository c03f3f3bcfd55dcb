"""A teacher's features as targets: the source CLIP's text features of the English translation of a sentence.

M-CLIP (Carlsson et al. 2022) and AltCLIP (Chen et al. 2022) regress on these features. A third way is the contrastive
loss with the teacher's embeddings in the place of images (`losses.build`).
"""

import torch
import torch.nn.functional as F

from koclip.losses.pairs import Embeddings


def distillation(embeddings: Embeddings, teacher: torch.Tensor, cosine: float, mse: float) -> torch.Tensor:
    """Return the weighted sum of two distances from texts to the teacher's features, means over B pairs.

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
