"""Compute the embeddings of data sources that are not stored yet, each process its own shards.

Alignment embeds once, before the first step: images by a frozen tower (`Images`), sentences by the teacher
(`Captions`). A shard is computed from the same rows in the same batches by any number of processes: filling can be
stopped and resumed, and gives the same bytes.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from koclip import distributed
from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data.loader import read_parts
from koclip.data.sources import MapSource, Row, StreamSource, open_source
from koclip.data.transforms import ImageError, Views, decode, digest_of, read
from koclip.embeddings.store import SHARD, Entry, Item, Shard, Shards, Store, write_shard
from koclip.encoders.base import fingerprint, texts_in_batches
from koclip.models.dual_encoder import DualEncoder, encode_images, text_features
from koclip.models.fast import speed_up
from koclip.models.stock import StockModel, layout_of
from koclip.text import tokenizers
from koclip.text.normalize import paired, usable

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS = 1_024  # of a source in a shard
PIECE = 128  # rows read and embedded at a time


class Piece(NamedTuple):
    """Items that are read, and embedded, at a time."""

    num_rows: int
    items: list[Item]
    inputs: Any  # of the n items without a `reason`: views (n, V, 3, H, W) uint8, sentences, or pictures
    entries: Sequence[Entry] = ()  # what an index keeps of these n
    unpaired: dict[str, int] | None = None  # see `koclip.embeddings.fill.Captions`
    start: int = 0  # number of the first row


Embed = Callable[[Piece], torch.Tensor]  # returns (n, V, D)


class Reader(Protocol):
    """How the items of rows are read."""

    images: bool  # whether it needs the rows' images

    def piece(self, rows: Sequence[Row], wanted: bool) -> Piece:
        """Return the items of rows; without inputs unless their embeddings are wanted."""


def embed_shard(path: Path, pieces: Iterable[Piece], embed: Embed, dtype: torch.dtype) -> None:
    """Embed pieces, one at a time, and write them as a shard."""
    items: list[Item] = []
    entries: list[Entry] = []
    parts: list[torch.Tensor] = []
    for piece in pieces:
        items += piece.items
        entries += piece.entries
        if not all(item.reason for item in piece.items):
            parts.append(embed(piece).to(dtype).cpu())
    write_shard(path, torch.cat(parts) if parts else torch.zeros(0, 1, 0, dtype=dtype), items, entries)


@dataclass
class SourceShards:
    """This process's shards of a source.

    Args:
        source: The source.
        reader: What is read of its rows.
        folder: Where the shards are.
        rank: This process's number: it has every `world_size`-th shard.
        world_size: Number of processes.
    """

    source: MapSource | StreamSource
    reader: Reader
    folder: Path
    rank: int = 0
    world_size: int = 1
    _stored: dict[int, bool] = field(default_factory=dict)  # decided once: another run may fill the same directory

    def read(self, num_workers: int) -> Iterator[tuple[Path, bool, Iterator[Piece]]]:
        """Yield each shard's path, whether it is stored, and its pieces; the inputs only of those that are not."""
        for part in self._parts() if self.source.size is not None else ():
            self._is_stored(part)  # before worker processes start
        pieces = read_parts(self.source, self._parts(), self._piece, self.reader.images, num_workers)
        for number, members in itertools.groupby(pieces, lambda piece: piece.start // ROWS):
            yield self._path(number), self._stored[number], members

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _is_stored(self, part: range) -> bool:
        number = part.start // ROWS
        if number not in self._stored:
            self._stored[number] = self._path(number).exists()
        return self._stored[number]

    def _piece(self, rows: list[Row], part: range) -> Piece:
        return self.reader.piece(rows, wanted=not self._is_stored(part))._replace(start=part.start)

    def _parts(self) -> Iterator[range]:
        """Yield the rows of each piece; without end if the number of rows is not known."""
        size = self.source.size
        for number in itertools.count(self.rank, self.world_size):
            first, last = number * ROWS, (number + 1) * ROWS
            if size is not None:
                last = min(size, last)
                if first >= size:
                    return
            for start in range(first, last, PIECE):
                yield range(start, min(start + PIECE, last))


class Work(NamedTuple):
    """What is embedded, and how."""

    reader: Reader
    embed: Embed
    dtype: torch.dtype  # that is stored
    label: str  # of the progress bar


def fill(store: Store, facts: dict[str, Any], config: DataConfig, work: Work) -> tuple[Shards, list[Counter[str]]]:
    """Check the shards of the sources that are stored, compute the others; call it on every process.

    Returns:
        All shards, and for each source what `Piece.unpaired` counts.

    Raises:
        ConfigError: the directory holds embeddings of something else.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    if rank == 0:
        store.claim(facts)
    distributed.barrier()
    sources = [open_source(source, config.seed) for source in config.sources]
    own: list[Path] = []
    unpaired = [Counter[str]() for _ in sources]
    total = sum(source.size or 0 for source in sources)
    with tqdm(desc=work.label, total=total or None, unit=" rows", disable=rank > 0) as bar:
        for number, source in enumerate(sources):
            folder = store.path / f"{number}-{source.config.short_name}"
            shards = SourceShards(source, work.reader, folder, rank, world_size)
            for path, stored, members in shards.read(config.num_workers):
                pieces = _counted(members, bar, world_size, unpaired[number])
                if stored:
                    Shard(path, store.key).check([item for piece in pieces for item in piece.items])
                else:
                    embed_shard(path, pieces, work.embed, work.dtype)
                own.append(path)
    paths = sorted(itertools.chain(*distributed.gather_objects(own)))
    left_over = sorted(set(store.path.rglob("shard-*.safetensors")) - set(paths))
    if left_over:
        raise ConfigError(
            f"{store.key}: {left_over[0]} is of rows that the sources no longer have; delete {store.path} or name "
            "another directory"
        )
    everywhere = distributed.gather_objects(unpaired)
    return Shards(paths, store.key), [sum(parts, Counter()) for parts in zip(*everywhere, strict=True)]


def _counted(pieces: Iterable[Piece], bar: Any, world_size: int, unpaired: Counter[str]) -> Iterator[Piece]:
    """Pass pieces on, add up what is `unpaired` and move the bar, which takes all processes to be as fast as this."""
    for piece in pieces:
        unpaired.update(piece.unpaired or {})
        yield piece
        bar.update(min(piece.num_rows * world_size, (bar.total or math.inf) - bar.n))


DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_KEY = "align.cache_dir"


class Cache(NamedTuple):
    """Where embeddings are kept, in which type (`fp16` or `fp32`), and whether faster layers compute them."""

    directory: Path
    dtype: str = "fp16"
    fast: bool = True

    def part(self, name: str) -> "Cache":
        """Return the same with a folder inside of this one."""
        return self._replace(directory=self.directory / name)


class Images:
    """Every row's image, as `views.count` views of it."""

    images = True

    def __init__(self, views: Views, max_pixels: int) -> None:
        self._views, self._max_pixels = views, max_pixels

    def piece(self, rows: Sequence[Row], wanted: bool) -> Piece:
        """Return one item per row; without embedding if its image cannot be used."""
        items: list[Item] = []
        views: list[torch.Tensor] = []
        for row in rows:
            digest, reason = digest_of(row.key.encode()), ""
            try:
                content = read(row.image)
                digest = digest_of(content)
                if wanted:
                    views.append(self._see(content, digest))
            except ImageError as error:
                reason = str(error)
            items.append(Item(row.key, digest, reason))
        # One tensor: each takes a file handle on its way from a worker, and there are only so many.
        return Piece(len(rows), items, torch.stack(views) if views else torch.empty(0))

    def _see(self, content: bytes | npt.NDArray[np.uint8], digest: bytes) -> torch.Tensor:
        """Return the views (V, 3, H, W) of an image."""
        image = decode(content, self._max_pixels)
        return torch.stack([self._views.numbered(image, digest, number) for number in range(self._views.count)])


class Captions:
    """Every caption in one language, each once per piece of rows.

    `Piece.unpaired` counts what does not correspond to it: `rows/<language>`, rows with unequal numbers of captions in
    the two languages, and `captions/<language>`, captions that have none in this language in their place.
    """

    images = False

    def __init__(self, language: str) -> None:
        self._language = language

    def piece(self, rows: Sequence[Row], wanted: bool) -> Piece:
        """Return the captions."""
        texts = list(dict.fromkeys(text for row in rows for text in usable(row.captions.get(self._language, []))))
        items = [Item(text[:80], digest_of(text.encode())) for text in texts]
        return Piece(len(rows), items, texts, unpaired=self._unpaired(rows))

    def _unpaired(self, rows: Sequence[Row]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for captions in (row.captions for row in rows):
            for language, own in captions.items() if self._language in captions else ():
                places = paired(own, captions[self._language])
                counts[f"rows/{language}"] += places is None
                counts[f"captions/{language}"] += 0 if places is None else len(usable(own)) - len(places)
        return dict(counts)  # PyTorch's data loader doubles the numbers of a Counter


@torch.no_grad()
def image_features(
    accelerator: "Accelerator", encoder: DualEncoder, config: DataConfig, views: Views, cache: Cache
) -> Shards:
    """Return the unit-norm embeddings of every view of every image; compute those that are not stored.

    Args:
        accelerator: Its device and precision are those of the image tower.
        encoder: Its image side computes the embeddings.
        config: The sources.
        views: What the tower is shown.
        cache: Where the embeddings are stored.

    Raises:
        ConfigError: the directory holds embeddings of another tower, of other views or of other images.
    """
    model = encoder.model
    if cache.fast:
        speed_up(model, accelerator.device)
    encoder.to(accelerator.device).eval()

    def embed(piece: Piece) -> torch.Tensor:
        pixels = cast(torch.Tensor, piece.inputs).to(accelerator.device)  # (n, V, 3, H, W)
        with accelerator.autocast():
            batches = pixels.flatten(0, 1).split(PIECE)
            parts = [encode_images(model, encoder.normalized(batch)) for batch in batches]
        embeddings: torch.Tensor = torch.cat(parts).unflatten(0, pixels.shape[:2])  # (n, V, D)
        return embeddings

    facts = {
        "features": "unit-norm embeddings of images",
        "image tower": fingerprint(*(model.get_submodule(name) for name in layout_of(model).image_side)),
        "views": views.description,
        "pixels": f"mean {_numbers(encoder.pixel_mean)}, deviation {_numbers(encoder.pixel_std)}",
        "largest image": f"{config.max_image_pixels} pixels",
        "precision": f"{accelerator.mixed_precision}, kept in {cache.dtype}",
    }
    work = Work(Images(views, config.max_image_pixels), embed, DTYPES[cache.dtype], "image features")
    return fill(Store(cache.directory, _KEY), facts, config, work)[0]


@torch.no_grad()
def teacher_features(
    accelerator: "Accelerator",
    teacher: tuple[StockModel, PreTrainedTokenizerBase],
    config: DataConfig,
    language: str,
    cache: Cache,
) -> Shards:
    """Return the teacher's features of every caption in its language; compute those that are not stored.

    Prints how many captions, and rows with unequal numbers of captions, have no counterpart in the teacher's language.

    Args:
        accelerator: Its device and precision are used.
        teacher: A dual encoder, and the tokenizer of its text tower.
        config: The sources.
        language: The teacher's.
        cache: Where the features are stored.

    Raises:
        ConfigError: the directory holds features of another teacher or of other sentences.
    """
    model, tokenizer = teacher
    if cache.fast:
        speed_up(model, accelerator.device)
    model.to(accelerator.device).eval()

    def embed_batch(texts: list[str]) -> torch.Tensor:
        encoded: Any = tokenizers.encode(tokenizer, texts, padding=True, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            return text_features(model, encoded["input_ids"], encoded["attention_mask"])  # (n, D)

    def embed(piece: Piece) -> torch.Tensor:
        texts = cast(list[str], piece.inputs)
        return texts_in_batches(embed_batch, texts, PIECE).unsqueeze(1)

    tokenizers.forget_call_state(tokenizer)
    facts = {
        "features": f"features of sentences, {language}",
        "text tower": fingerprint(*(model.get_submodule(name) for name in layout_of(model).text_side)),
        "tokenizer": xxh3_128(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "longest sentence": f"{tokenizer.model_max_length} tokens",
        "precision": f"{accelerator.mixed_precision}, kept in {cache.dtype}",
    }
    work = Work(Captions(language), embed, DTYPES[cache.dtype], "teacher's features")
    shards, unpaired = fill(Store(cache.directory, _KEY), facts, config, work)
    if accelerator.is_main_process:
        for source, counts in zip(config.sources, unpaired, strict=True):
            _print_unpaired(source, counts)
    cast(nn.Module, model).to("cpu")  # it is not needed again
    return shards


def _print_unpaired(source: SourceConfig, counts: Counter[str]) -> None:
    """Print what does not correspond to the teacher's language (`Captions`), of the languages that are trained."""
    weights = source.languages or dict.fromkeys(source.captions, 1.0)
    for language in (name for name, weight in weights.items() if weight):
        rows, captions = counts[f"rows/{language}"], counts[f"captions/{language}"]
        for count, what in (
            (rows, f"rows have unequal numbers of captions in {language} and in the teacher's: any of them teaches"),
            (
                captions,
                f"captions in {language} have none in the teacher's language in their place: they are not taught",
            ),
        ):
            if count:
                tqdm.write(f"{source.short_name}: {count:,} {what}")


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.flatten().tolist()]
