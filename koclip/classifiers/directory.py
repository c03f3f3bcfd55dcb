"""The classifier directory: classifier.safetensors and classifier.json, which name each other's parts and the encoder.

A linear classifier holds `weight` (C, D) and `bias` (C,); one by Tip-Adapter also the cache, `keys` (M, D) and `labels`
(M,). classifier.json holds the format version, the classes with their names, the temperature, the threshold of "none of
these" and the fingerprint of the encoder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from koclip import storage
from koclip.classifiers.heads import Head, Shots
from koclip.config import ConfigError, check
from koclip.encoders import Encoder, load
from koclip.encoders.base import Picture

FORMAT = 1
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
NONE = {"ko": "해당 없음", "en": "none of these"}


class Prediction(NamedTuple):
    """The answer for an image."""

    label: str | None  # key of the class; None: none of the classes
    names: Mapping[str, str]  # by language; for None "해당 없음" and "none of these"
    probability: float  # of the most probable class
    probabilities: Mapping[str, float]  # by key


@dataclass(frozen=True)
class Classifier:
    """A classifier with the encoder that it belongs to; `load_classifier` opens it.

    `facts` is the content of classifier.json.
    """

    head: Head
    facts: Mapping[str, Any]
    encoder: Encoder

    @property
    def labels(self) -> list[str]:
        """The keys of the classes."""
        return [entry["key"] for entry in self.facts["classes"]]

    def logits(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Return the logits (N, C) float64 of PIL images or file paths, divided by the temperature."""
        logits = self.head.logits(self.encoder.encode_images(pictures))
        return logits.double() / float(self.facts["temperature"])  # float64, as the thresholds are

    def predict(self, pictures: Sequence[Picture]) -> list[Prediction]:
        """Return the answer for every picture: PIL images or file paths. See `Encoder.encode_images` for errors."""
        return [self._prediction(row) for row in self.logits(pictures).softmax(dim=1)]

    def _prediction(self, probabilities: torch.Tensor) -> Prediction:
        best, thresholds = int(probabilities.argmax()), (self.facts["none"] or {}).get("thresholds")
        refused = thresholds is not None and bool((probabilities < torch.tensor(thresholds, dtype=torch.float64)).all())
        entry = self.facts["classes"][best]
        by_key = dict(zip(self.labels, probabilities.tolist(), strict=True))
        label = None if refused else entry["key"]
        return Prediction(label, NONE if refused else entry["names"], float(probabilities[best]), by_key)


def save_classifier(directory: Path, head: Head, facts: Mapping[str, Any]) -> None:
    """Write the two files of a classifier; `facts` are those of classifier.json without `format`."""
    tensors = {"weight": head.weight, "bias": head.bias}
    described = dict(facts)
    if head.cache is not None:
        tensors |= {"keys": head.cache.images, "labels": head.cache.labels}
        described |= {"alpha": head.alpha, "beta": head.beta}
    with storage.atomic(directory / WEIGHTS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    text = json.dumps({"format": FORMAT, **described}, indent=2, ensure_ascii=False, allow_nan=False)
    storage.replace_text(directory / FACTS, text + "\n")


def load_classifier(directory: str | Path, encoder: Encoder | None = None) -> Classifier:
    """Open a classifier that `koclip adapt` has written.

    Args:
        directory: The directory.
        encoder: The encoder that it was made for. Default: the model is opened by the name in classifier.json.

    Raises:
        ConfigError: the directory is not complete, its format is unknown, or the encoder embeds images in another way
            than the encoder that the classifier was made for.
    """
    directory = Path(directory)
    facts = _facts(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
        cache = Shots(tensors["keys"], tensors["labels"]) if "keys" in tensors else None
        head = Head(tensors["weight"], tensors["bias"], cache, facts.get("alpha", 0.0), facts.get("beta", 0.0))
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"classifier: {directory / WEIGHTS} cannot be read ({error}): run koclip adapt again"
        ) from error
    shape, expected = tuple(head.weight.shape), (len(facts["classes"]), facts["width"])
    check(shape == expected, f"classifier: {WEIGHTS}, weight", shape, f"expected {expected}, as {FACTS} says")
    own = facts["encoder"]
    opened = load(own["name"]) if encoder is None else encoder
    fits = opened.image_fingerprint() == own["fingerprint"]
    fix = f"expected the images of {own['name']}: pass this encoder, or adapt again with the other"
    check(fits, f"classifier: {directory}, encoder", opened.name, fix)
    return Classifier(head, facts, opened)


def _facts(directory: Path) -> dict[str, Any]:
    file = directory / FACTS
    command = "koclip adapt --model <model> --images <folder> --output_dir <directory>"
    check(file.is_file(), "classifier", str(directory), f"expected a directory with {FACTS}; write it with: {command}")
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"classifier: {file} is broken ({error}): run koclip adapt again") from error
    check(
        version == FORMAT, f"classifier: {file}, format", version, f"expected {FORMAT}: update koclip, or adapt again"
    )
    return facts
