"""Compute the embeddings of data sources that are not stored yet. Each process computes its own shards.

Alignment does this before the first step: a frozen tower embeds the images, the teacher embeds the captions. With any
number of processes, a shard is computed from the same rows in the same batches. So filling can be stopped and resumed,
and gives the same bytes.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

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
from koclip.embeddings.store import SHARD, Entry, Shard, Shards, Store, StoredItem, write_shard
from koclip.encoders.base import fingerprint, texts_in_batches
from koclip.models.dual_encoder import DualEncoder, encode_images, text_features
from koclip.models.fast import speed_up
from koclip.models.stock import StockModel, layout_of
from koclip.text import tokenizers
from koclip.text.normalize import paired, usable

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_ROWS = 1_024  # rows of a source in a shard
BATCH_ROWS = 128  # rows read and embedded at a time


class ItemBatch(NamedTuple):
    """Items that are read and embedded together."""

    num_rows: int
    items: list[StoredItem]
    inputs: Any  # of the n items without a `reason`: views (n, V, 3, H, W) uint8, texts, or images
    entries: Sequence[Entry] = ()  # index entries of these n items
    unpaired: dict[str, int] | None = None  # see `CaptionReader`
    start: int = 0  # number of the first row


Embed = Callable[[ItemBatch], torch.Tensor]  # returns (n, V, D)


class ItemReader(Protocol):
    """Reads the items of rows."""

    images: bool  # whether it needs the rows' images

    def read(self, rows: Sequence[Row], wanted: bool) -> ItemBatch:
        """Return the items of rows. Their inputs are read only if `wanted`."""


def embed_shard(path: Path, batches: Iterable[ItemBatch], embed: Embed, dtype: torch.dtype) -> None:
    """Embed batches, one at a time, and write them as a shard."""
    items: list[StoredItem] = []
    entries: list[Entry] = []
    parts: list[torch.Tensor] = []
    for batch in batches:
        items += batch.items
        entries += batch.entries
        if not all(item.reason for item in batch.items):
            parts.append(embed(batch).to(dtype).cpu())
    write_shard(path, torch.cat(parts) if parts else torch.zeros(0, 1, 0, dtype=dtype), items, entries)


@dataclass
class SourceShards:
    """The shards of a source, in `folder`, of this process: every `world_size`-th shard, from number `rank` on."""

    source: MapSource | StreamSource
    reader: ItemReader
    folder: Path
    rank: int = 0
    world_size: int = 1
    _stored: dict[int, bool] = field(default_factory=dict)  # decided once: another run may fill the same directory

    def read(self, num_workers: int) -> Iterator[tuple[Path, bool, Iterator[ItemBatch]]]:
        """Yield each shard's path, whether it is stored, and its batches. Stored shards need no inputs."""
        for rows in self._row_ranges() if self.source.size is not None else ():
            self._is_stored(rows)  # before worker processes start
        batches = read_parts(self.source, self._row_ranges(), self._batch, self.reader.images, num_workers)
        for number, members in itertools.groupby(batches, lambda batch: batch.start // SHARD_ROWS):
            yield self._path(number), self._stored[number], members

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _is_stored(self, rows: range) -> bool:
        number = rows.start // SHARD_ROWS
        if number not in self._stored:
            self._stored[number] = self._path(number).exists()
        return self._stored[number]

    def _batch(self, rows: list[Row], numbers: range) -> ItemBatch:
        return self.reader.read(rows, wanted=not self._is_stored(numbers))._replace(start=numbers.start)

    def _row_ranges(self) -> Iterator[range]:
        """Yield the row numbers of each batch; endlessly if the number of rows is not known."""
        size = self.source.size
        for number in itertools.count(self.rank, self.world_size):
            first, last = number * SHARD_ROWS, (number + 1) * SHARD_ROWS
            if size is not None:
                last = min(size, last)
                if first >= size:
                    return
            for start in range(first, last, BATCH_ROWS):
                yield range(start, min(start + BATCH_ROWS, last))


class Work(NamedTuple):
    """How items are read, embedded and stored."""

    reader: ItemReader
    embed: Embed
    dtype: torch.dtype  # of the stored embeddings
    label: str  # of the progress bar


def fill(store: Store, facts: dict[str, Any], config: DataConfig, work: Work) -> tuple[Shards, list[Counter[str]]]:
    """Check the stored shards of the sources and compute the missing shards. Call it on every process.

    Returns:
        All shards, and the sum of `ItemBatch.unpaired` for each source.

    Raises:
        ConfigError: the directory holds embeddings of other data, or with other settings.
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
                batches = _counted(members, bar, world_size, unpaired[number])
                if stored:
                    Shard(path, store.key).check([item for batch in batches for item in batch.items])
                else:
                    embed_shard(path, batches, work.embed, work.dtype)
                own.append(path)
    paths = sorted(itertools.chain(*distributed.gather_objects(own)))
    left_over = sorted(set(store.path.rglob("shard-*.safetensors")) - set(paths))
    if left_over:
        raise ConfigError(
            f"{store.key}: the rows of {left_over[0]} are no longer in the sources; delete {store.path} or name "
            "another directory"
        )
    gathered = distributed.gather_objects(unpaired)
    return Shards(paths, store.key), [sum(parts, Counter()) for parts in zip(*gathered, strict=True)]


def _counted(batches: Iterable[ItemBatch], bar: Any, world_size: int, unpaired: Counter[str]) -> Iterator[ItemBatch]:
    """Yield the batches; add up `unpaired`, and move the bar as if all processes were equally fast."""
    for batch in batches:
        unpaired.update(batch.unpaired or {})
        yield batch
        bar.update(min(batch.num_rows * world_size, (bar.total or math.inf) - bar.n))


DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_KEY = "align.cache_dir"


class Cache(NamedTuple):
    """A directory for embeddings, their type (`fp16` or `fp32`), and whether faster layers compute them."""

    directory: Path
    dtype: str = "fp16"
    fast: bool = True

    def part(self, name: str) -> "Cache":
        """Return the cache in a subfolder."""
        return self._replace(directory=self.directory / name)


class ImageReader:
    """Reads the image of each row, in `views.count` views."""

    images = True

    def __init__(self, views: Views, max_pixels: int) -> None:
        self._views, self._max_pixels = views, max_pixels

    def read(self, rows: Sequence[Row], wanted: bool) -> ItemBatch:
        """Return one item per row, with a `reason` if its image cannot be used."""
        items: list[StoredItem] = []
        inputs: list[torch.Tensor] = []
        for row in rows:
            digest, reason = digest_of(row.key.encode()), ""
            try:
                content = read(row.image)
                digest = digest_of(content)
                if wanted:
                    image = decode(content, self._max_pixels)
                    views = [self._views.numbered(image, digest, number) for number in range(self._views.count)]
                    inputs.append(torch.stack(views))  # (V, 3, H, W)
            except ImageError as error:
                reason = str(error)
            items.append(StoredItem(row.key, digest, reason))
        # One tensor, because each tensor from a worker process takes a file handle.
        return ItemBatch(len(rows), items, torch.stack(inputs) if inputs else torch.empty(0))


class CaptionReader:
    """Reads every caption in one language, each once per batch of rows.

    `ItemBatch.unpaired` counts, for each other language: `rows/<language>`, rows whose numbers of captions differ
    between the two languages; and `captions/<language>`, captions whose counterpart is missing.
    """

    images = False

    def __init__(self, language: str) -> None:
        self._language = language

    def read(self, rows: Sequence[Row], wanted: bool) -> ItemBatch:
        """Return the captions."""
        texts = list(dict.fromkeys(text for row in rows for text in usable(row.captions.get(self._language, []))))
        items = [StoredItem(text[:80], digest_of(text.encode())) for text in texts]
        return ItemBatch(len(rows), items, texts, unpaired=self._unpaired(rows))

    def _unpaired(self, rows: Sequence[Row]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for captions in (row.captions for row in rows):
            for language, own in captions.items() if self._language in captions else ():
                pairs = paired(own, captions[self._language])
                counts[f"rows/{language}"] += pairs is None
                counts[f"captions/{language}"] += 0 if pairs is None else len(usable(own)) - len(pairs)
        return dict(counts)  # PyTorch's data loader doubles the numbers of a Counter


@torch.no_grad()
def image_features(
    accelerator: "Accelerator", encoder: DualEncoder, config: DataConfig, views: Views, cache: Cache
) -> Shards:
    """Return the unit-norm embeddings of every view of every image of the sources, by the image side of `encoder`.

    Embeddings that are not in `cache` are computed, on the accelerator's device and in its precision.

    Raises:
        ConfigError: the directory holds embeddings by another tower, or of other views or images.
    """
    model = encoder.model
    if cache.fast:
        speed_up(model, accelerator.device)
    encoder.to(accelerator.device).eval()

    def embed(batch: ItemBatch) -> torch.Tensor:
        pixels = cast(torch.Tensor, batch.inputs).to(accelerator.device)  # (n, V, 3, H, W)
        with accelerator.autocast():
            views = pixels.flatten(0, 1).split(BATCH_ROWS)
            parts = [encode_images(model, encoder.normalized(part)) for part in views]
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
    work = Work(ImageReader(views, config.max_image_pixels), embed, DTYPES[cache.dtype], "image features")
    return fill(Store(cache.directory, _KEY), facts, config, work)[0]


@torch.no_grad()
def teacher_features(
    accelerator: "Accelerator",
    teacher: tuple[StockModel, PreTrainedTokenizerBase],
    config: DataConfig,
    language: str,
    cache: Cache,
) -> Shards:
    """Return the teacher's features of every caption in its language.

    Features that are not in `cache` are computed, on the accelerator's device and in its precision. Prints how many
    captions and rows have no counterpart in the teacher's language. The teacher is a dual encoder with its tokenizer.

    Raises:
        ConfigError: the directory holds features by another teacher or of other captions.
    """
    model, tokenizer = teacher
    if cache.fast:
        speed_up(model, accelerator.device)
    model.to(accelerator.device).eval()

    def embed_batch(texts: list[str]) -> torch.Tensor:
        encoded: Any = tokenizers.encode(tokenizer, texts, padding=True, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            return text_features(model, encoded["input_ids"], encoded["attention_mask"])  # (n, D)

    def embed(batch: ItemBatch) -> torch.Tensor:
        return texts_in_batches(embed_batch, cast(list[str], batch.inputs), BATCH_ROWS).unsqueeze(1)

    tokenizers.forget_call_state(tokenizer)
    facts = {
        "features": f"features of sentences, {language}",
        "text tower": fingerprint(*(model.get_submodule(name) for name in layout_of(model).text_side)),
        "tokenizer": xxh3_128(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "longest sentence": f"{tokenizer.model_max_length} tokens",
        "precision": f"{accelerator.mixed_precision}, kept in {cache.dtype}",
    }
    work = Work(CaptionReader(language), embed, DTYPES[cache.dtype], "teacher's features")
    shards, unpaired = fill(Store(cache.directory, _KEY), facts, config, work)
    if accelerator.is_main_process:
        for source, counts in zip(config.sources, unpaired, strict=True):
            _print_unpaired(source, counts, language)
    cast(nn.Module, model).to("cpu")  # free the device's memory
    return shards


def _print_unpaired(source: SourceConfig, counts: Counter[str], teacher: str) -> None:
    """Print the counts of `CaptionReader` for the languages that are trained."""
    effects = {
        "rows": "rows have different numbers of captions in {} and {}: any caption of the row is the teacher's",
        "captions": "captions in {} have no counterpart in {}: they are not distilled",
    }
    weights = source.languages or dict.fromkeys(source.captions, 1.0)
    for language in (name for name, weight in weights.items() if weight):
        for kind, effect in effects.items():
            if count := counts[f"{kind}/{language}"]:
                tqdm.write(f"{source.short_name}: {count:,} {effect.format(language, teacher)}")


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.flatten().tolist()]
