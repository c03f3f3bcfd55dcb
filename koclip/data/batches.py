"""Rows -> Batch: draw a caption, decode and crop the image, tokenize, pad to the longest caption of the batch."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_64_intdigest

from koclip.config import DataConfig
from koclip.data.sources import Row
from koclip.data.tables import SourceError
from koclip.data.transforms import ImageError, TrainTransform, decode
from koclip.text import tokenizers

MAX_REPLACEMENTS = 1_000  # rows tried in a row before a source counts as unusable


class Skip(NamedTuple):
    """A sample left out of training, and why."""

    key: str
    reason: str
    source: str = ""


class Position(NamedTuple):
    """How far one reader of streamed data was when its current pool of rows began, and batches made of the pool.

    `passes` holds (epoch, rows of it read) for every source, `rows` the number of rows read in all.
    """

    reader: int
    rows: int = 0
    batches: int = 0
    passes: tuple[tuple[int, int], ...] = ()


class Candidate(NamedTuple):
    """A row that may become a sample: the number of its source and the seed of all that is random about it."""

    row: Row
    source: int
    seed: tuple[int, ...]


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
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the model takes."""
        return self.pixel_values, self.input_ids, self.attention_mask

    @property
    def padding_share(self) -> float:
        """Share of the text positions that hold padding."""
        return 1.0 - self.attention_mask.float().mean().item()

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return dataclasses.replace(
            self,
            pixel_values=move(self.pixel_values),
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            caption_ids=move(self.caption_ids),
        )

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


def generator(purpose: str, *key: int) -> random.Random:
    """Return a generator that is a function of its arguments, in every process and on every machine."""
    return random.Random(f"{purpose} {key}")


class Assembler:
    """Makes batches of rows. Every random choice about a row comes from that row's own seed."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, image_size: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._transform = TrainTransform(config, image_size)
        self._languages = [source.languages or dict.fromkeys(source.captions, 1.0) for source in config.sources]

    def caption(self, captions: dict[str, list[str]], source: int, seed: tuple[int, ...]) -> str | None:
        """Draw a language by its weight among those a row has captions in, then one of these; None if there is none."""
        weights = self._languages[source]
        languages = [language for language in captions if weights.get(language)]
        if not languages:
            return None
        rng = generator("caption", *seed)
        language = rng.choices(languages, [weights[language] for language in languages])[0]
        caption = rng.choice(captions[language])
        return self._drop_words(caption, rng) if self.config.word_dropout else caption

    def lengths(self, captions: list[str | None]) -> list[int]:
        """Return each caption's length in tokens (0 for none)."""
        encoded = tokenizers.encode(self.tokenizer, [caption or "" for caption in captions])
        return [len(ids) if caption else 0 for ids, caption in zip(encoded["input_ids"], captions, strict=True)]

    def sample(self, row: Row, source: int, seed: tuple[int, ...]) -> Sample | Skip:
        """Turn one row into a training pair, or say why it cannot be one."""
        path = self.config.sources[source].path
        caption = self.caption(row.captions, source, seed)
        if caption is None:
            return Skip(row.key, "no usable caption", path)
        try:
            image = decode(row.image, self.config.max_image_pixels)
        except ImageError as error:
            return Skip(row.key, str(error), path)
        crop_seed = generator("crop", *seed).getrandbits(62)
        return Sample(self._transform(image, crop_seed), caption, row.key)

    def _drop_words(self, caption: str, rng: random.Random) -> str:
        """Leave each word out with the chance that `data.word_dropout` names, but never all of them."""
        words = caption.split()
        kept = [word for word in words if rng.random() >= self.config.word_dropout]
        return " ".join(kept or [rng.choice(words)])

    def fill(self, wanted: int, candidates: Iterator[Candidate]) -> Batch:
        """Draw candidates until `wanted` of them are good, and collate those.

        Raises:
            SourceError: `MAX_REPLACEMENTS` candidates in a row were unusable.
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
                raise SourceError(
                    f"source {made.source!r}: {in_a_row} samples in a row could not be used; "
                    f"the last one: {made.key}: {made.reason}"
                )
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
