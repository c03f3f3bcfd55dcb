"""Compute the embeddings of data sources that are not stored yet. Each process computes its own shards.

Alignment does this before the first step: a frozen tower embeds the images, the teacher embeds the captions. With any
number of processes, a shard is computed from the same rows in the same batches. So filling can be stopped and resumed,
and gives the same bytes.

A store has a folder of shards for each source and selection of rows (`where`, `image_range`). An image or a caption
that another folder has is copied from there, so a part of a data set, or a larger data set, needs only what is new, and
what two sources share is embedded once.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_64_hexdigest, xxh3_128

from koclip import distributed
from koclip.config import ConfigError, DataConfig, SourceConfig
from koclip.data.loader import read_parts
from koclip.data.sources import MapSource, Row, StreamSource, open_source
from koclip.data.transforms import Views
from koclip.embeddings.readers import CaptionReader, ImageReader, ItemBatch, ItemReader
from koclip.embeddings.store import (
    SHARD,
    SHARDS,
    Copies,
    Entry,
    Shard,
    Shards,
    Store,
    StoredItem,
    holds,
    write_shard,
)
from koclip.encoders.base import fingerprint, texts_in_batches
from koclip.models.dual_encoder import DualEncoder, encode_images, pooled_images, pooled_texts, text_features
from koclip.models.fast import speed_up
from koclip.models.stock import StockModel, layout_of
from koclip.text import tokenizers

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_ROWS = 1_024  # rows of a source in a shard
BATCH_ROWS = 128  # rows read and embedded at a time
Embed = Callable[[ItemBatch], torch.Tensor]  # returns (n, V, D)


def embed_shard(
    path: Path, batches: Iterable[ItemBatch], embed: Embed, dtype: torch.dtype, copies: Copies | None = None
) -> None:
    """Embed batches, one at a time, and write them as a shard. `copies` has the items that need no embedding."""
    items: list[StoredItem] = []
    entries: list[Entry] = []
    parts: list[torch.Tensor] = []
    for batch in batches:
        items += batch.items
        entries += batch.entries
        usable_items = [item for item in batch.items if not item.reason]
        if usable_items:
            embedded = embed(batch).to(dtype).cpu() if len(batch.inputs) else torch.empty(0)
            parts.append(copies.complete(usable_items, embedded) if copies else embedded)
    write_shard(path, torch.cat(parts) if parts else torch.zeros(0, 1, 0, dtype=dtype), items, entries)


@dataclass
class SourceShards:
    """The shards of a source, in `folder`, of this process: every `world_size`-th shard, from number `rank` on."""

    source: MapSource | StreamSource
    reader: ItemReader
    folder: Path
    rank: int = 0
    world_size: int = 1
    copied: npt.NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, "S16"))  # sorted digests; see `Copies`
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
        stored = self._is_stored(numbers)
        batch = self.reader.read(rows, lambda digest: not stored and not holds(self.copied, digest))
        return batch._replace(start=numbers.start)

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
    folders = [store.path / _folder(number, source) for number, source in enumerate(config.sources)]
    own: list[Path] = []
    unpaired = [Counter[str]() for _ in sources]
    total = sum(source.size or 0 for source in sources)
    with tqdm(desc=work.label, total=total or None, unit=" rows", disable=rank > 0) as bar:
        for number, source in enumerate(sources):
            copies = _copies(store, folders[number:])
            shards = SourceShards(source, work.reader, folders[number], rank, world_size, copies.digests)
            for path, stored, members in shards.read(config.num_workers):
                batches = _counted(members, bar, world_size, unpaired[number])
                if stored:
                    Shard(path, store.key).check([item for batch in batches for item in batch.items])
                else:
                    embed_shard(path, batches, work.embed, work.dtype, copies)
                own.append(path)
            distributed.barrier()  # the next source copies from this one
    paths = sorted(itertools.chain(*distributed.gather_objects(own)))
    left_over = sorted({path for folder in folders for path in folder.glob(SHARDS)} - set(paths))
    if left_over:
        raise ConfigError(
            f"{store.key}: the rows of {left_over[0]} are no longer in the sources; delete {left_over[0].parent} or "
            "name another directory"
        )
    gathered = distributed.gather_objects(unpaired)
    return Shards(paths, store.key), [sum(parts, Counter()) for parts in zip(*gathered, strict=True)]


def _copies(store: Store, incomplete: Sequence[Path]) -> Copies:
    """Return the embeddings that can be copied: those of all folders of a store but the `incomplete` folders."""
    return Copies(Shards(sorted(path for path in store.path.rglob(SHARDS) if path.parent not in incomplete), store.key))


def _folder(number: int, source: SourceConfig) -> str:
    """Return the name of a source's folder in a store; each selection of rows has its own."""
    selected = {"where": source.where, "image_range": source.image_range}
    chosen = {name: value for name, value in selected.items() if value}
    suffix = f"~{xxh3_64_hexdigest(repr(chosen).encode())[:8]}" if chosen else ""
    return f"{number}-{source.short_name}{suffix}"


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


@torch.no_grad()
def image_features(
    accelerator: "Accelerator", encoder: DualEncoder, config: DataConfig, views: Views, cache: Cache
) -> Shards:
    """Return the unit-norm embeddings of every view of every image of the sources, by the image side of `encoder`.

    If only the image projection is trained, they are the tower's features before it. Embeddings that are not in
    `cache` are computed, on the accelerator's device and in its precision.

    Raises:
        ConfigError: the directory holds embeddings by another tower, or of other views or images.
    """
    model, pooled = encoder.model, encoder.trains_projection("image")
    layout, forward = layout_of(model), pooled_images if pooled else encode_images
    if cache.fast:
        speed_up(model, accelerator.device)
    encoder.to(accelerator.device).eval()

    def embed(batch: ItemBatch) -> torch.Tensor:
        pixels = cast(torch.Tensor, batch.inputs).to(accelerator.device)  # (n, V, 3, H, W)
        with accelerator.autocast():
            views = pixels.flatten(0, 1).split(BATCH_ROWS)
            parts = [forward(model, encoder.normalized(part)) for part in views]
        embeddings: torch.Tensor = torch.cat(parts).unflatten(0, pixels.shape[:2])  # (n, V, D)
        return embeddings

    facts = {
        "features": "pooled features of images" if pooled else "unit-norm embeddings of images",
        "image tower": fingerprint(*map(model.get_submodule, [layout.image_tower] if pooled else layout.image_side)),
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
    tower = fingerprint(*(model.get_submodule(name) for name in layout_of(model).text_side))
    facts = {"features": f"features of sentences, {language}", "text tower": tower}
    reader = TextReader(model, tokenizer, text_features, facts, "teacher's features")
    shards, unpaired = _caption_features(accelerator, reader, config, language, cache)
    if accelerator.is_main_process:
        for source, counts in zip(config.sources, unpaired, strict=True):
            _print_unpaired(source, counts, language)
    cast(nn.Module, model).to("cpu")  # free the device's memory
    return shards


@torch.no_grad()
def pooled_captions(
    accelerator: "Accelerator", model: StockModel, tokenizer: PreTrainedTokenizerBase, config: DataConfig, cache: Cache
) -> dict[str, Shards]:
    """Return the inputs of the text projection of every caption, by language, for each language that is drawn.

    Features that are not in `cache` are computed, on the accelerator's device and in its precision. Each language has
    its own folder, so runs with other languages, projections or image towers may share the directory.

    Raises:
        ConfigError: the directory holds features by another tower or of other captions.
    """
    tower = fingerprint(model.get_submodule(layout_of(model).text_tower))
    shards = {}
    for language in sorted({language for source in config.sources for language in _drawn(source)}):
        facts = {"features": f"pooled features of captions, {language}", "text tower": tower}
        facts["pooling"] = getattr(model.config, "pooling", type(model).__name__)
        reader = TextReader(model, tokenizer, pooled_texts, facts, f"text features, {language}")
        part = cache.part(f"texts-{language}")
        shards[language], _ = _caption_features(accelerator, reader, config, language, part)
    return shards


class TextReader(NamedTuple):
    """A text tower that reads captions."""

    model: StockModel
    tokenizer: PreTrainedTokenizerBase
    forward: Callable[[StockModel, torch.Tensor, torch.Tensor], torch.Tensor]  # of ids and mask (n, L); returns (n, D)
    facts: dict[str, Any]  # about the tower and the features
    label: str  # of the progress bar


def _caption_features(
    accelerator: "Accelerator", reader: TextReader, config: DataConfig, language: str, cache: Cache
) -> tuple[Shards, list[Counter[str]]]:
    """Fill a store with the features of every caption in a language. See `fill`."""
    model: Any = reader.model
    if cache.fast:
        speed_up(model, accelerator.device)
    model.to(accelerator.device).eval()

    def embed_batch(texts: list[str]) -> torch.Tensor:
        encoded: Any = tokenizers.encode(reader.tokenizer, texts, padding=True, return_tensors="pt")
        encoded = encoded.to(accelerator.device)
        with accelerator.autocast():
            return reader.forward(model, encoded["input_ids"], encoded["attention_mask"])  # (n, D)

    def embed(batch: ItemBatch) -> torch.Tensor:
        return texts_in_batches(embed_batch, cast(list[str], batch.inputs), BATCH_ROWS).unsqueeze(1)

    tokenizers.forget_call_state(reader.tokenizer)
    facts = reader.facts | {
        "tokenizer": xxh3_128(reader.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "longest sentence": f"{reader.tokenizer.model_max_length} tokens",
        "precision": f"{accelerator.mixed_precision}, kept in {cache.dtype}",
    }
    work = Work(CaptionReader(language), embed, DTYPES[cache.dtype], reader.label)
    return fill(Store(cache.directory, _KEY), facts, config, work)


def _drawn(source: SourceConfig) -> list[str]:
    """Return the languages of a source whose captions are trained on."""
    weights = source.languages or dict.fromkeys(source.captions, 1.0)
    return [language for language, weight in weights.items() if weight]


def _print_unpaired(source: SourceConfig, counts: Counter[str], teacher: str) -> None:
    """Print the counts of `CaptionReader` for the languages that are trained."""
    effects = {
        "rows": "rows have different numbers of captions in {} and {}: any caption of the row is the teacher's",
        "captions": "captions in {} have no counterpart in {}: they are not distilled",
    }
    for language in _drawn(source):
        for kind, effect in effects.items():
            if count := counts[f"{kind}/{language}"]:
                tqdm.write(f"{source.short_name}: {count:,} {effect.format(language, teacher)}")


def _numbers(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.flatten().tolist()]
