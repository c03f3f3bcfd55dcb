"""Survey the sources before the first step: measure caption lengths, and hash the data to detect later changes.

Each process surveys its share of the rows, in blocks, in its data workers. The joined result does not depend on the
number of processes.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import HfApi
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from koclip.config import DataConfig
from koclip.data.formats.files import SourceError, file_format, stored_files
from koclip.data.sources import MapSource, StreamSource, TableSource
from koclip.text import tokenizers

BLOCK = 1_024  # rows
_SAMPLE = 2**16  # bytes of a shard that are hashed, in each of three places
_BLOCKS_PER_WORKER = 4  # at least
_MAX_CACHED = 2**17  # texts whose length a process caches

Tokens = npt.NDArray[np.uint16]


class Block(NamedTuple):
    """The survey of some rows, or of some files of a stream."""

    digest: bytes
    captions: npt.NDArray[np.int64] = np.empty(0, np.int64)  # number of captions of each row in each language
    parts: npt.NDArray[np.int64] = np.empty(0, np.int64)  # number of parts of each caption
    tokens: Tokens = np.empty(0, np.uint16)  # number of tokens of each part


class Survey(NamedTuple):
    """The survey of a source."""

    facts: dict[str, Any]  # equal for equal data
    lengths: "CaptionLengths | None" = None  # None if batches are not grouped by length


class CaptionLengths:
    """The lengths in tokens of all captions of a source, in flat arrays.

    A caption has one part, or with `data.word_dropout` one part per word. The sum over words is exact for tokenizers
    that split at white space, and an estimate for others. Captions get `special` tokens and are cut to `longest`.
    """

    def __init__(self, languages: Sequence[str], blocks: Sequence[Block], special: int, longest: int) -> None:
        self._languages, self._special, self._longest = languages, special, longest
        self._captions = _starts([block.captions for block in blocks])
        self._parts = _starts([block.parts for block in blocks])
        self._tokens = np.concatenate([block.tokens for block in blocks])

    def row(self, row: int) -> dict[str, list[range]]:
        """Return the ranges of the parts of a row's captions by language; an unusable caption has an empty range."""
        first = row * len(self._languages)
        bounds = self._captions[first : first + len(self._languages) + 1].tolist()
        captions = {}
        for language, (start, stop) in zip(self._languages, itertools.pairwise(bounds), strict=True):
            if stop > start:
                captions[language] = [
                    range(*pair) for pair in itertools.pairwise(self._parts[start : stop + 1].tolist())
                ]
        return captions

    def total(self, parts: Iterable[int]) -> int:
        """Return the length of a caption with these parts."""
        return min(self._special + int(self._tokens[list(parts)].sum()), self._longest)


def look(
    source: MapSource | StreamSource,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Block]:
    """Yield the blocks of this process's share of a source; `join` joins the shares, in rank order."""
    if isinstance(source, StreamSource):
        files = stored_files(source.config)
        share = range(len(files) * rank // world_size, len(files) * (rank + 1) // world_size)
        yield from (_look_at_file(files[number], source) for number in share)
        return
    if not source.stored and config.length_pool == 1:
        return  # no lengths are needed, and the rows cannot change
    if config.num_workers:
        single_threaded()
    count = -(-len(source) // BLOCK)
    numbers = range(count * rank // world_size, count * (rank + 1) // world_size)
    blocks = DataLoader(
        _Blocks(source, config, tokenizer),
        batch_size=None,
        sampler=cast(Any, numbers),
        num_workers=min(config.num_workers, len(numbers) // _BLOCKS_PER_WORKER),
        collate_fn=cast(Any, _unchanged),
        generator=torch.Generator(),  # the default would draw from the generator that dropout uses
    )
    yield from blocks


def join(
    source: MapSource | StreamSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase, blocks: Sequence[Block]
) -> Survey:
    """Return the survey of a source from all its blocks."""
    digest = xxh3_128(b"".join(block.digest for block in blocks)).hexdigest()
    name = {"source": source.config.short_name}
    if isinstance(source, StreamSource):
        return Survey(name | {"shards": source.num_shards, "revision": _revision(source), "digest": digest})
    facts = name | {"rows": len(source), "digest": digest}
    if config.length_pool == 1:
        return Survey(facts)
    special, longest = tokenizer.num_special_tokens_to_add(), tokenizer.model_max_length
    return Survey(facts, CaptionLengths(list(source.config.captions), blocks, special, longest))


def survey_source(source: MapSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Survey all rows of a source in this process."""
    return join(source, config, tokenizer, list(look(source, config, tokenizer)))


def single_threaded() -> None:
    """Turn off the threads of tokenizers, which forked workers must not use, unless the user has set them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _Blocks(Dataset[Block]):
    """Surveys the block of rows with the given number."""

    def __init__(self, source: MapSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._measures, self._by_word = config.length_pool > 1, config.word_dropout > 0
        self._special = tokenizer.num_special_tokens_to_add()
        self._sizes = source.picture_sizes() if isinstance(source, TableSource) else None
        self._known: dict[str, int] = {}

    def __getitem__(self, number: int) -> Block:
        rows = range(number * BLOCK, min((number + 1) * BLOCK, len(self._source)))
        captions, pictures = self._read(rows)
        digest = xxh3_128(repr(list(zip(captions, pictures, strict=True))).encode()).digest()
        if not self._measures:
            return Block(digest)
        languages = list(self._source.config.captions)
        cells = [row.get(language, []) for row in captions for language in languages]
        by_word = self._by_word
        parts = [caption.split() if by_word else [caption] * bool(caption) for cell in cells for caption in cell]
        return Block(
            digest,
            np.array([len(cell) for cell in cells], np.int64),
            np.array([len(part) for part in parts], np.int64),
            self._count(list(itertools.chain(*parts))),
        )

    def _read(self, rows: range) -> tuple[list[dict[str, list[str]]], list[Any]]:
        """Return captions, and for each picture its size in bytes, or name and size of its file, or its row."""
        if self._sizes is not None:
            return self._source.captions(rows), self._sizes[rows.start : rows.stop].to_pylist()
        if not isinstance(self._source, TableSource):
            return self._source.captions(rows), list(rows)
        read = self._source.rows(rows)
        return [row.captions for row in read], [_file_facts(row.image) for row in read]

    def _count(self, texts: Sequence[str]) -> Tokens:
        """Return the number of tokens of each text, without special tokens."""
        unknown = list(dict.fromkeys(text for text in texts if text not in self._known))
        if unknown:
            encoded = tokenizers.encode(self._tokenizer, unknown, return_attention_mask=False)["input_ids"]
            self._known |= {text: len(ids) - self._special for text, ids in zip(unknown, encoded, strict=True)}
        counts = np.array([self._known[text] for text in texts], np.uint16)
        if len(self._known) > _MAX_CACHED:
            self._known.clear()
        return counts


def _starts(counts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the start of each item in a flat array, and the end of the last, from the sizes of the items."""
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return ends.astype(np.min_scalar_type(int(ends[-1])))


def _unchanged(block: Block) -> Block:
    return block


def _file_facts(image: object) -> tuple[str, int] | None:
    if not isinstance(image, Path):
        return None
    try:
        return image.name, image.stat().st_size
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return image.name, -1


def _look_at_file(file: Path, source: StreamSource) -> Block:
    """Hash a file's name and size; of a shard also a sample of its beginning, middle and end."""
    size = file.stat().st_size
    digest = xxh3_128(repr((file.name, size)).encode())
    if file_format(source.config) != "image_folder":
        with file.open("rb") as opened:
            for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                opened.seek(max(0, start))
                digest.update(opened.read(_SAMPLE))
    return Block(digest.digest())


def _revision(source: StreamSource) -> str | None:
    """Return the commit of a stream from the Hub; None for other streams."""
    config = source.config
    if file_format(config) != "hub" or Path(config.path).exists():
        return None
    try:
        return HfApi().dataset_info(config.path, revision=config.revision).sha
    except OSError as error:
        raise SourceError(f"source {config.path!r}: the Hub does not return its commit: {error}") from error
