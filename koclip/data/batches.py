"""Rows -> Batch: draw a caption, decode and crop the image, tokenize, pad to the longest caption of the batch."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_64_intdigest

from koclip.config import DataConfig
from koclip.data.sources import Row
from koclip.data.transforms import ImageError, TrainTransform, decode
from koclip.text import tokenizers

MAX_REPLACEMENTS = 1_000  # rows tried in a row before a source counts as unusable


class Skip(NamedTuple):
    """A sample left out of training, and why."""

    key: str
    reason: str


class Position(NamedTuple):
    """How far one reader of streamed data is: rows read when its current pool began, batches made of the pool."""

    reader: int
    rows: int
    batches: int


@dataclass(frozen=True)
class Batch:
    """B pairs on their way to the model."""

    pixel_values: torch.Tensor  # (B, 3, H, W) uint8; the model normalises
    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64
    caption_ids: torch.Tensor  # (B,) int64, equal for equal captions
    keys: list[str]
    skipped: list[Skip]
    num_drawn: int  # rows looked at to fill this batch
    position: Position | None = None  # of a streamed source's reader

    @property
    def padding_share(self) -> float:
        """Share of the text positions that hold padding."""
        return 1.0 - self.attention_mask.float().mean().item()

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        names = ("pixel_values", "input_ids", "attention_mask", "caption_ids")
        return dataclasses.replace(self, **{name: move(getattr(self, name)) for name in names})

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory; the data loader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


class Sample(NamedTuple):
    """One pair before collation."""

    image: torch.Tensor  # (3, H, W) uint8
    caption: str
    key: str


class Assembler:
    """Makes batches of rows. Every random choice about a row comes from that row's own seed."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, image_size: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._transform = TrainTransform(config, image_size)
        self._languages = [source.languages or {} for source in config.sources]

    def caption(self, captions: dict[str, list[str]], source: int, seed: Sequence[int]) -> str | None:
        """Draw a language by its weight, then one of its captions; None if there is none."""
        weights = self._languages[source]
        chances = {language: weights.get(language, 0.0 if weights else 1.0) for language in captions}
        total = sum(chances.values())
        if total == 0:
            return None
        rng = np.random.default_rng([*seed, 0])
        language = str(rng.choice(list(chances), p=[chance / total for chance in chances.values()]))
        caption = captions[language][int(rng.integers(len(captions[language])))]
        return self._drop_words(caption, rng) if self.config.word_dropout else caption

    def lengths(self, captions: list[str | None]) -> list[int]:
        """Return each caption's length in tokens (0 for none)."""
        encoded = tokenizers.encode(self.tokenizer, [caption or "" for caption in captions])
        return [len(ids) if caption else 0 for ids, caption in zip(encoded["input_ids"], captions, strict=True)]

    def sample(self, row: Row, source: int, seed: Sequence[int]) -> Sample | Skip:
        """Turn one row into a training pair, or say why it cannot be one."""
        caption = self.caption(row.captions, source, seed)
        if caption is None:
            return Skip(row.key, "no usable caption")
        try:
            image = decode(row.image, self.config.max_image_pixels)
        except ImageError as error:
            return Skip(row.key, str(error))
        crop_seed = int(np.random.default_rng([*seed, 1]).integers(2**62))
        return Sample(self._transform(image, crop_seed), caption, row.key)

    def _drop_words(self, caption: str, rng: np.random.Generator) -> str:
        """Leave each word out with the chance that `data.word_dropout` names, but never all of them."""
        words = caption.split()
        kept = [word for word in words if rng.random() >= self.config.word_dropout]
        return " ".join(kept or [words[int(rng.integers(len(words)))]])

    def fill(self, wanted: int, candidates: Iterator[tuple[Row, int, Sequence[int]]]) -> Batch:
        """Draw (row, source, seed) candidates until `wanted` of them are good, and collate those.

        Raises:
            ValueError: `MAX_REPLACEMENTS` candidates in a row were unusable.
        """
        samples: list[Sample] = []
        skipped: list[Skip] = []
        in_a_row = num_drawn = 0
        while len(samples) < wanted:
            made = self.sample(*next(candidates))
            num_drawn += 1
            if isinstance(made, Sample):
                samples.append(made)
                in_a_row = 0
                continue
            skipped.append(made)
            in_a_row += 1
            if in_a_row >= MAX_REPLACEMENTS:
                raise ValueError(f"{in_a_row} samples in a row could not be used; the last: {made.key}: {made.reason}")
        return self.collate(samples, skipped, num_drawn)

    def collate(self, samples: list[Sample], skipped: list[Skip], num_drawn: int) -> Batch:
        """Stack samples; captions are padded on the right to the longest of them."""
        captions = [sample.caption for sample in samples]
        text: Any = tokenizers.encode(self.tokenizer, captions, padding=True, return_tensors="pt")
        caption_ids = [xxh3_64_intdigest(caption.encode()) >> 1 for caption in captions]  # 63 bits fit an int64
        return Batch(
            pixel_values=torch.stack([sample.image for sample in samples]),
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            caption_ids=torch.tensor(caption_ids),
            keys=[sample.key for sample in samples],
            skipped=skipped,
            num_drawn=num_drawn,
        )
