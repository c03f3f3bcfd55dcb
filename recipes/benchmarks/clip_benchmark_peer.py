"""The evaluation of CLIP_benchmark: its loops and metrics, with a model that returns given embeddings."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
except ImportError as error:
    raise SystemExit(
        f"this benchmark needs CLIP_benchmark, which is not installed ({error}). In a separate venv, so that "
        "koclip does not come to depend on it: pip install --no-deps clip-benchmark"
    ) from error

_BATCH = 64


def _float(value: str | npt.NDArray[np.float32]) -> float:
    return float(value.item() if isinstance(value, np.ndarray) else value)


# CLIP_benchmark 1.6.2 turns an array of one number into a float, which numpy 2.4 refuses; the math stays its own.
zeroshot_classification.float = _float


class _Given:
    """A model whose images and tokenized texts are row numbers of given embeddings."""

    def __init__(self, images: Tensor, texts: dict[str, Tensor]) -> None:
        self._images = images
        self._texts = torch.stack(list(texts.values()))
        self._place = {text: number for number, text in enumerate(texts)}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self._place[text] for text in texts], dtype=torch.long)

    def encode_image(self, numbers: Tensor) -> Tensor:
        return self._images[numbers]

    def encode_text(self, numbers: Tensor) -> Tensor:
        return self._texts[numbers]


class _Classes(NamedTuple):
    classes: Sequence[str]


class _Batches:
    """Batches of image numbers and their targets; as much of a data loader as CLIP_benchmark uses."""

    def __init__(self, targets: Sequence[list[str]] | Tensor, classes: Sequence[str] = ()) -> None:
        self._targets, self.dataset = targets, _Classes(classes)

    def __iter__(self) -> Iterator[tuple[Tensor, Sequence[list[str]] | Tensor]]:
        for start in range(0, len(self._targets), _BATCH):
            part = self._targets[start : start + _BATCH]
            yield torch.arange(start, start + len(part)), part


def retrieval(
    images: Tensor, texts: dict[str, Tensor], captions: Sequence[list[str]], ks: Sequence[int]
) -> dict[str, float]:
    """Return `zeroshot_retrieval.evaluate`'s recalls under koclip's names, of embeddings that may have any length.

    Args:
        images: (N, D).
        texts: The embedding (D,) of every caption.
        captions: Those of each image.
        ks: The ks.
    """
    model = _Given(images, texts)
    metrics = zeroshot_retrieval.evaluate(
        model, _Batches(captions), model.tokenize, "cpu", amp=False, recall_k_list=list(ks)
    )
    directions = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
    return {f"{own}/recall@{k}": metrics[f"{peer}_recall@{k}"] for peer, own in directions.items() for k in ks}


def zero_shot(
    images: Tensor, texts: dict[str, Tensor], prompts: dict[str, list[str]], labels: Tensor
) -> dict[str, float]:
    """Return `zeroshot_classification.evaluate`'s numbers under koclip's names.

    Args:
        images: (N, D).
        texts: The embedding (D,) of every prompt.
        prompts: By class; CLIP_benchmark's class-specific prompts.
        labels: (N,) Each image's class.
    """
    model = _Given(images, texts)
    names = list(prompts)
    metrics = zeroshot_classification.evaluate(
        model, _Batches(labels, names), model.tokenize, names, prompts, "cpu", amp=False
    )
    return {
        "zero_shot/accuracy": metrics["acc1"],
        "zero_shot/accuracy@5": metrics["acc5"],
        "zero_shot/mean_per_class": float(metrics["mean_per_class_recall"]),
    }
