"""Features of a frozen text tower, standardised, so that a linear projection of them learns in few steps.

A projection without a bias can scale its inputs, but not shift them. So the tower itself gets the shift and the scale:
its last layer norm (or the linear layer of its pooler) takes them up exactly, and the model stays of its stock class.

The projection also needs a bias: the embeddings of images have a mean that is not 0, and texts must reach it. So one
direction of the features has the constant 1 instead of the mean 0: the direction in which they vary least. After a
layer norm they do not vary in it at all, because the norm fixes a weighted sum of its outputs. The weights of this
direction are then exactly a bias.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from koclip.config import AlignConfig
from koclip.data.batches import Lookup
from koclip.embeddings.fill import Cache, pooled_captions
from koclip.embeddings.store import Shards
from koclip.models.dual_encoder import pooled_texts
from koclip.models.stock import StockModel, layout_of
from koclip.text import tokenizers

if TYPE_CHECKING:
    from accelerate import Accelerator

_PROBES = ("고양이 사진", "two dogs run along the beach", "빨간 우산을 쓴 사람이 길을 건너고 있다")
_TRIED = 4  # modules, from the output down, that may take up the shift and the scale
_TOLERANCE = 1e-3  # of standardised features, in float32


class Standardized:
    """Stored features, minus `mean` (W,) and divided by `deviation` (W,)."""

    def __init__(self, features: Lookup, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        self._features, self._mean, self._deviation = features, mean, deviation

    def embedding(self, digest: bytes, view: int = 0) -> torch.Tensor:
        """Return the features (W,) of the item with this digest. See `Shards.embedding`."""
        return (self._features.embedding(digest, view) - self._mean) / self._deviation


def standardized_texts(
    accelerator: "Accelerator",
    model: StockModel,
    tokenizer: PreTrainedTokenizerBase,
    config: AlignConfig,
    cache: Cache,
) -> Mapping[str, Lookup] | None:
    """Return the inputs of the text projection for every training caption, by language; None if `align.cache` is off.

    Changes the text tower so that these inputs have deviation 1 over the captions, and mean 0, except for the constant
    of the bias. It stays as it is if no module of it can do that, or if the source's own text projection is kept.
    Prints which of these happened.

    Raises:
        ConfigError: see `pooled_captions`.
    """
    features: Mapping[str, Any] = pooled_captions(accelerator, model, tokenizer, config.data, cache)
    count = sum(map(len, features.values()))
    place = None
    if config.model.text_encoder != "same":
        mean, deviation = moments(list(features.values()))
        mean -= deviation * least_varied(list(features.values()), mean, deviation)
        encoded: Any = tokenizers.encode(tokenizer, list(_PROBES), padding=True, return_tensors="pt")
        place = standardize(model, (encoded["input_ids"], encoded["attention_mask"]), mean, deviation)
    if place is not None:
        accelerator.print(f"Text features: standardised over {count:,} captions, in {place}")
        features = {name: Standardized(own, mean, deviation) for name, own in features.items()}
    else:
        kept = "the projection of the source is kept" if config.model.text_encoder == "same" else "no layer can do it"
        accelerator.print(f"Text features: of {count:,} captions, not standardised, because {kept}")
    return features if config.align.cache else None


def moments(features: Sequence[Shards]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation (W,) of all features, float32. A deviation of almost 0 becomes 1."""
    rows = [part for shards in features for part in shards.rows if len(part)]
    count = sum(map(len, rows))
    mean = torch.stack([part.double().sum(0) for part in rows]).sum(0) / count
    square = torch.stack([(part.double() - mean).square().sum(0) for part in rows]).sum(0) / count
    deviation = square.sqrt()
    deviation[deviation < 1e-4 * deviation.mean()] = 1.0
    return mean.float(), deviation.float()


def least_varied(features: Sequence[Shards], mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return the unit vector (W,) along which the standardised features vary least."""
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in (part for shards in features for part in shards.rows if len(part)):
        standard = (part.double() - mean) / deviation
        covariance += standard.T @ standard
    direction: torch.Tensor = torch.linalg.eigh(covariance).eigenvectors[:, 0].float()  # eigenvalues ascend
    return direction * direction[direction.abs().argmax()].sign()  # the sign is arbitrary, a resumed run needs the same


@torch.no_grad()
def standardize(
    model: StockModel, probe: tuple[torch.Tensor, torch.Tensor], mean: torch.Tensor, deviation: torch.Tensor
) -> str | None:
    """Change the text tower so that the inputs of the text projection become (input - mean) / deviation.

    The first module, from the output down, whose scale and shift do exactly that is changed: the last layer norm,
    also if tokens are averaged, or the linear layer of a pooler. Whether it does is measured on the texts of `probe`,
    ids and mask (B, L).

    Returns:
        The name of the changed module; None if there is none, and then the model is as before.
    """
    tower = model.get_submodule(layout_of(model).text_tower)
    device = next(tower.parameters()).device
    mean, deviation = mean.to(device), deviation.to(device)
    ids, mask = (part.to(device) for part in probe)
    wanted = (pooled_texts(model, ids, mask) - mean) / deviation
    for name, module in _affine(tower, len(mean)):
        weight, bias = module.weight.clone(), module.bias.clone()
        module.weight.div_(deviation.reshape(-1, *[1] * (weight.ndim - 1)))
        module.bias.sub_(mean).div_(deviation)
        if (pooled_texts(model, ids, mask) - wanted).abs().max() < _TOLERANCE:
            return f"{layout_of(model).text_tower}.{name}"
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return None


def _affine(tower: nn.Module, width: int) -> list[tuple[str, Any]]:
    """Return the last modules with a scale and a shift of their `width` outputs, from the output down."""
    modules = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is not None and len(module.bias) == width
    ]
    return modules[::-1][:_TRIED]
