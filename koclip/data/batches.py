"""Rows -> Batch: choose a caption, decode and crop the image, tokenize, pad to the longest caption of the batch."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_64_intdigest

from koclip.config import DataConfig
from koclip.data.formats import RowCaptions
from koclip.data.order import CaptionChooser, generator
from koclip.data.sources import Row, Skip, SourceError
from koclip.data.transforms import ImageError, MissingError, Views, decode, digest_of, image_id, read
from koclip.text import tokenizers
from koclip.text.normalize import usable

MAX_REPLACEMENTS = 1_000  # rows tried for one sample before the source counts as unusable


class Position(NamedTuple):
    """Resume point of a stream reader: rows read before its current pool, and samples taken from the pool.

    It counts rows and samples, so that a run may resume with another batch or micro-batch size.
    """

    reader: int
    rows: int = 0  # read before the pool
    passes: tuple[tuple[int, int], ...] = ()  # for each source: epoch, and rows of it read before the pool
    chunks: int = 0  # chunks of captions of similar length in the pool
    chunk_size: int = 0  # samples per chunk
    samples: int = 0  # taken from the pool
    replaced: tuple[int, ...] = ()  # for each source: rows read since then to replace unusable rows


class SeededRow(NamedTuple):
    """A row, the number of its source, and the seed of its random choices."""

    row: Row
    source: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """B pairs on their way to the model."""

    input_ids: torch.Tensor  # (B, L) int64; (B, 0) with `text_pooled`
    attention_mask: torch.Tensor  # (B, L) int64
    pair_ids: torch.Tensor  # (B, 2) int64, equal for equal captions and images; (B, 3) with the teacher's sentences
    keys: list[str]
    skipped: list[Skip]
    num_drawn: int  # rows read to fill this batch
    pixel_values: torch.Tensor | None = None  # (B, 3, H, W) uint8; the model normalises
    image: torch.Tensor | None = None  # (B, D) unit norm, cached embeddings instead of pixels
    image_pooled: torch.Tensor | None = None  # (B, W) cached features before the projection, instead of pixels
    text_pooled: torch.Tensor | None = None  # (B, W) cached features before the projection, instead of tokens
    teacher: torch.Tensor | None = None  # (B, D) the teacher's features
    readable: torch.Tensor | None = None  # (B,) bool: the caption is in the teacher's language; with a teacher
    source_image: torch.Tensor | None = None  # (B, D) unit norm, the source's embeddings if its image tower is trained
    position: Position | None = None  # of the stream reader

    @property
    def inputs(self) -> dict[str, torch.Tensor | None]:
        """The arguments of the model."""
        inputs = {"pixel_values": self.pixel_values, "input_ids": self.input_ids, "attention_mask": self.attention_mask}
        cached = {"image": self.image, "image_pooled": self.image_pooled, "text_pooled": self.text_pooled}
        return inputs | {name: value for name, value in cached.items() if value is not None}

    @property
    def targets(self) -> tuple[torch.Tensor, ...]:
        """The arguments of the loss after the embeddings."""
        targets = (self.pair_ids, self.teacher, self.readable, self.source_image)
        return tuple(target for target in targets if target is not None)

    @property
    def padding_share(self) -> float:
        """Share of the text positions that hold padding."""
        mask = self.attention_mask
        return 1.0 - mask.float().mean().item() if mask.numel() else 0.0

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        moved: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def cut(self, pieces: Sequence[slice]) -> Iterator["Batch"]:
        """Yield micro-batches, each padded to its own longest caption; the first one lists the skipped rows."""
        for number, piece in enumerate(pieces):
            rows = self._map(lambda tensor, piece=piece: tensor[piece])  # type: ignore[misc]
            longest = int(rows.attention_mask.sum(dim=1).max())
            skipped = [] if number else self.skipped
            yield dataclasses.replace(
                rows,
                input_ids=rows.input_ids[:, :longest],
                attention_mask=rows.attention_mask[:, :longest],
                keys=self.keys[piece],
                skipped=skipped,
                num_drawn=len(rows.input_ids) + len(skipped),
            )

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory, for the data loader."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


class Seen(NamedTuple):
    """A view of an image: pixels, or the cached embedding instead of them."""

    image_id: int
    pixels: torch.Tensor | None = None  # (3, H, W) uint8
    image: torch.Tensor | None = None  # (D,), or (W,) before the projection
    source: torch.Tensor | None = None  # (D,) the source's embedding, beside pixels


class Sample(NamedTuple):
    """One pair before collation."""

    key: str
    caption: str
    seen: Seen
    text: torch.Tensor | None  # (W,) cached features
    sentence: str | None
    teacher: torch.Tensor | None  # (D,)
    language: str


class Lookup(Protocol):
    """Stored embeddings, by a hash of the content."""

    def embedding(self, digest: bytes, view: int = 0) -> torch.Tensor:
        """Return the embedding (D,) float32 of a view; raises a `MissingError` if it is not stored."""


class Precomputed(NamedTuple):
    """Embeddings that frozen towers computed before training."""

    images: Lookup | None = None  # instead of pixels
    images_pooled: bool = False  # whether `images` are features before the image projection, not embeddings
    texts: Mapping[str, Lookup] | None = None  # instead of tokens: features before the text projection, by language
    teacher: Lookup | None = None  # features of the translations of captions
    source_images: Lookup | None = None  # the source's embeddings, beside pixels
    language: str = "en"  # of the translations


class Assembler:
    """Makes batches from rows. Each row has its own seed for all its random choices.

    Without `views` the batches have no images. `precomputed` are embeddings of frozen towers.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        views: Views | None,
        precomputed: Precomputed | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._views, self._precomputed = views, precomputed or Precomputed()
        taught = self._precomputed.teacher is not None
        self.chooser = CaptionChooser(config, self._precomputed.language if taught else None)

    @property
    def needs_images(self) -> bool:
        """Whether rows must be read with their images."""
        return self._views is not None

    def lengths(self, captions: list[str | None]) -> list[int]:
        """Return the length of each caption in tokens, 0 for None."""
        encoded = tokenizers.encode(self.tokenizer, [caption or "" for caption in captions])
        return [len(ids) if caption else 0 for ids, caption in zip(encoded["input_ids"], captions, strict=True)]

    def sample(self, row: Row, source: int, seed: tuple[int, ...]) -> Sample | Skip:
        """Turn a row into a training pair, or skip it and return the reason."""
        path = self.config.sources[source].path
        chosen = self.chooser.caption(row.captions, source, seed)
        if chosen is None:
            gaps = any(self.chooser.languages[source].get(language) for language in row.captions)
            reason = f"no caption has a translation in {self._precomputed.language}" if gaps else "no usable caption"
            return Skip(row.key, reason, path)
        language, place, caption = chosen
        try:
            seen = self._see(row, seed)
            text = self._read(language, caption)
            sentence, teacher = self._teach(row.captions, (language, place), seed)
        except (ImageError, MissingError) as error:
            return Skip(row.key, str(error), path)
        return Sample(row.key, caption, seen, text, sentence, teacher, language)

    def _see(self, row: Row, seed: tuple[int, ...]) -> "Seen":
        """Return the number of the image, and one of its views."""
        if self._views is None:
            return Seen(xxh3_64_intdigest(row.key.encode()) >> 1)
        content = read(row.image)
        digest = digest_of(content)
        number_of_image = image_id(digest)
        count = self._views.count
        number = generator("view", *seed).randrange(count) if count else 0
        if self._precomputed.images is not None:
            return Seen(number_of_image, image=self._precomputed.images.embedding(digest, number))
        decoded = decode(content, self.config.max_image_pixels)
        if count:
            known = self._precomputed.source_images
            source = None if known is None else known.embedding(digest, number)
            return Seen(number_of_image, self._views.numbered(decoded, digest, number), source=source)
        return Seen(number_of_image, self._views.random(decoded, generator("crop", *seed).getrandbits(62)))

    def _read(self, language: str, caption: str) -> torch.Tensor | None:
        """Return the cached features (W,) of a caption; None if its tokens are needed."""
        texts = self._precomputed.texts
        return None if texts is None else texts[language].embedding(digest_of(caption.encode()))

    def _teach(
        self, captions: RowCaptions, chosen: tuple[str, int], seed: tuple[int, ...]
    ) -> tuple[str | None, torch.Tensor | None]:
        """Return the translation of a caption in the teacher's language, and its features (D,).

        The translation has the same position if both languages have equally many captions, else a random one.
        """
        if self._precomputed.teacher is None:
            return None, None
        language, place = chosen
        sentences = captions.get(self._precomputed.language, [])
        if not sentences:
            raise MissingError(f"no caption in {self._precomputed.language}, the teacher's language")
        aligned = len(sentences) == len(captions[language])
        sentence = sentences[place] if aligned else generator("sentence", *seed).choice(usable(sentences))
        return sentence, self._precomputed.teacher.embedding(digest_of(sentence.encode()))

    def fill(self, draws: Iterable[Iterator[SeededRow]]) -> Batch:
        """Make a batch with one sample for each draw: the drawn row, then the rows that replace it if it is unusable.

        Raises:
            SourceError: `MAX_REPLACEMENTS` rows for a sample were unusable.
        """
        samples: list[Sample] = []
        skipped: list[Skip] = []
        for candidates in draws:
            for candidate in itertools.islice(candidates, MAX_REPLACEMENTS):
                sample = self.sample(*candidate)
                if isinstance(sample, Sample):
                    samples.append(sample)
                    break
                skipped.append(sample)
            else:
                last = skipped[-1]
                raise SourceError(
                    f"source {last.source!r}: {MAX_REPLACEMENTS} consecutive rows are unusable, the last one is "
                    f"{last.key} ({last.reason}); check the data"
                )
        return self.collate(samples, skipped, len(samples) + len(skipped))

    def collate(self, samples: list[Sample], skipped: list[Skip], num_drawn: int) -> Batch:
        """Stack samples; captions are padded on the right to the longest caption."""
        captions = [sample.caption for sample in samples]
        text_pooled = _stack([sample.text for sample in samples])
        if text_pooled is None:
            text: Any = tokenizers.encode(self.tokenizer, captions, padding=True, return_tensors="pt")
        else:
            text = dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(len(samples), 0, dtype=torch.int64))
        ids = [_numbers(captions), [sample.seen.image_id for sample in samples]]
        sentences = [sample.sentence for sample in samples if sample.sentence is not None]
        readable = [sample.language == self._precomputed.language for sample in samples]
        images, pooled = [sample.seen.image for sample in samples], self._precomputed.images_pooled
        return Batch(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pair_ids=torch.tensor([*ids, _numbers(sentences)] if sentences else ids).T.contiguous(),
            keys=[sample.key for sample in samples],
            skipped=skipped,
            num_drawn=num_drawn,
            pixel_values=_stack([sample.seen.pixels for sample in samples]),
            image=None if pooled else _unit(images),
            image_pooled=_stack(images) if pooled else None,
            text_pooled=text_pooled,
            teacher=_stack([sample.teacher for sample in samples]),
            readable=torch.tensor(readable) if sentences else None,
            source_image=_unit([sample.seen.source for sample in samples]),
        )


def _numbers(texts: Sequence[str]) -> list[int]:
    """Return a number for each text: 63 bits of its hash, which fit an int64."""
    return [xxh3_64_intdigest(text.encode()) >> 1 for text in texts]


def _unit(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stack embeddings with unit norm; fp16 has changed the norms slightly."""
    stacked = _stack(tensors)
    return None if stacked is None else F.normalize(stacked, dim=-1)


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
