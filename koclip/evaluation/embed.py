"""Embed whole data sets, each only once, kept on disk by model and data; rank them, shared among processes."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from koclip import distributed, metrics
from koclip.config import ConfigError
from koclip.embeddings.store import Shard, write_shard
from koclip.encoders import Encoder
from koclip.evaluation.images import Images

Item = TypeVar("Item")
Result = TypeVar("Result")
_QUERIES = 4_096  # ranked at once; always as many, so that the number of processes changes no bit


@dataclass(frozen=True)
class Captions:
    """Distinct captions and their images. Equal captions are one caption with several images."""

    texts: list[str]  # at the end those of the gallery, which no image has
    images: list[list[int]]  # by caption that an image has: the images
    texts_of: list[list[int]]  # by image: its captions


def collect(captions: list[list[str]], gallery: list[str]) -> Captions:
    """Return the distinct captions of the images and of the gallery."""
    place = {text: number for number, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    images: list[list[int]] = [[] for _ in place]
    for image, own in enumerate(captions):
        for text in dict.fromkeys(own):
            images[place[text]].append(image)
    others = [text for text in dict.fromkeys(gallery) if text not in place]
    return Captions([*place, *others], images, [[place[text] for text in dict.fromkeys(own)] for own in captions])


def search(
    queries: torch.Tensor, gallery: torch.Tensor, positives: Sequence[Sequence[int]], spread: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's rank and its nearest entry (`koclip.metrics.search`), both (Q,).

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: The right entries of each query, at least one.
        spread: Share the queries among the processes, all of which must call this.
    """
    starts = range(0, len(queries), _QUERIES)
    parts = [slice(start, start + _QUERIES) for start in starts]
    results = share(lambda part: metrics.search(queries[part], gallery, positives[part]), parts, spread)
    return torch.cat([ranks for ranks, _ in results]), torch.cat([nearest for _, nearest in results])


def share(work: Callable[[Item], Result], items: Sequence[Item], spread: bool) -> list[Result]:
    """Return the result of every item; if `spread`, the processes share the items, and all must call this."""
    return distributed.share(work, items) if spread else [work(item) for item in items]


class Embedder:
    """A cache of the embeddings of one encoder.

    Args:
        encoder: The model. It must not change while this object is used.
        batch_size: Images or texts encoded at once.
        cache: Folder that keeps embeddings, named by a hash of the model and a hash of the data; default: they are kept
            in memory, as long as this object lives.
        spread: Share the work among the processes, all of which must ask for the same. The batches stay the same, so
            that the embeddings do, bit for bit.
    """

    def __init__(self, encoder: Encoder, batch_size: int, cache: Path | None = None, spread: bool = False) -> None:
        self.encoder, self.spread, self._batch_size, self._cache = encoder, spread, batch_size, cache
        self._memory: dict[str, torch.Tensor] = {}  # tasks and languages ask for the same

    def alone(self) -> "Embedder":
        """Return the same embedder for one process alone: it calls no collective, and reads what is in the cache."""
        other = copy.copy(self)
        other.spread, other._memory = False, dict(self._memory)  # the other processes would lack what it adds
        return other

    def images(self, images: Images) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        return self._kept("images", images.digest, lambda: self._of_images(self.encoder.encode_images, images))

    def features(self, images: Images) -> torch.Tensor:
        """Return (N, W) features before the projection."""
        return self._kept("features", images.digest, lambda: self._of_images(self.encoder.image_features, images))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""

        def embed() -> torch.Tensor:
            # Raw: what a model does with decomposed text is measured, too.
            return self.encoder.encode_texts(texts, self._batch_size, raw=True, spread=self.spread)

        return self._kept("texts", lambda: xxh3_128_hexdigest(repr(list(texts)).encode()), embed)

    def _of_images(self, embed: Callable[..., torch.Tensor], images: Images) -> torch.Tensor:
        return embed(images, self._batch_size, spread=self.spread)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the embeddings depend on."""
        return self.encoder.fingerprint()

    def _kept(self, kind: str, digest: Callable[[], str], embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        name = f"{kind}-{digest()}-{self._batch_size}"
        if name not in self._memory:
            self._memory[name] = self._filed(name, embed) if self._cache else embed()
        return self._memory[name]

    def _filed(self, name: str, embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        assert self._cache is not None
        file = self._cache / self.fingerprint / f"{name}.safetensors"
        # The first process decides whether there is a file: another may look a moment later.
        kept = _read(file) if distributed.rank() == 0 or not self.spread else None
        if self.spread:
            kept = distributed.gather_objects(kept)[0]
        if kept is not None:
            return kept
        embedded = embed()
        if distributed.rank() == 0 or not self.spread:
            write_shard(file, embedded, shared=True)  # another evaluation may write the same
        return embedded


def _read(file: Path) -> torch.Tensor | None:
    """Return the embeddings in a file; None if there is none. A broken file is named, and computed anew."""
    try:
        if not file.exists():
            return None
        shard = Shard(file, "cache_dir")
        shard.verify()
        return shard.embeddings
    except ConfigError as error:
        tqdm.write(str(error))
        return None
