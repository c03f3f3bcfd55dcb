"""The contrastive losses as their papers write them, all similarities at once; and distances to a teacher."""

import torch
import torch.nn.functional as F

from koclip import distributed
from koclip.losses.pairs import Embeddings, Loss, Pairs, accuracy


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
