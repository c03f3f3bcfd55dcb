"""Embed whole data sets: shared among processes, once, kept on disk by model and data."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from koclip import distributed
from koclip.config import ConfigError
from koclip.embeddings.store import Shard, write_shard
from koclip.encoders import Encoder
from koclip.evaluation.images import Pictures
from koclip.metrics import search

Item = TypeVar("Item")
Result = TypeVar("Result")
_QUERIES = 4_096  # ranked at once; always as many, so that the number of processes changes no bit


class Embedder:
    """Embeds with one encoder.

    Args:
        encoder: The model.
        batch_size: Images or texts encoded at once.
        cache: Folder that keeps embeddings, found again by a hash of the model and one of the data; default: they are
            kept in memory, as long as this object lives. Its model must not change meanwhile.
        spread: Share the work among the processes, all of which must ask for the same. The batches stay the same, so
            that the embeddings do, bit for bit.
    """

    def __init__(self, encoder: Encoder, batch_size: int, cache: Path | None = None, spread: bool = False) -> None:
        self.encoder, self._batch_size, self._cache, self._spread = encoder, batch_size, cache, spread
        self._memory: dict[str, torch.Tensor] = {}  # tasks and languages ask for the same

    def alone(self) -> "Embedder":
        """Return the same embedder for one process alone: it calls no collective, and finds what has been kept."""
        other = copy.copy(self)
        other._spread, other._memory = False, dict(self._memory)  # what it adds, the other processes would not have
        return other

    def images(self, pictures: Pictures) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        return self._kept("images", pictures.digest, lambda: self._of_images(self.encoder.encode_images, pictures))

    def features(self, pictures: Pictures) -> torch.Tensor:
        """Return (N, W) features before the projection."""
        return self._kept("features", pictures.digest, lambda: self._of_images(self.encoder.image_features, pictures))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""

        def embed() -> torch.Tensor:
            # Raw: what a model does with decomposed text is measured, too.
            return self.encoder.encode_texts(texts, self._batch_size, raw=True, spread=self._spread)

        return self._kept("texts", lambda: xxh3_128_hexdigest(repr(list(texts)).encode()), embed)

    def search(
        self, queries: torch.Tensor, gallery: torch.Tensor, positives: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each query's rank and its nearest entry (`koclip.metrics.search`)."""
        starts = range(0, len(queries), _QUERIES)
        parts = [slice(start, start + _QUERIES) for start in starts]
        results = self.share(lambda part: search(queries[part], gallery, positives[part]), parts)
        return torch.cat([ranks for ranks, _ in results]), torch.cat([nearest for _, nearest in results])

    def share(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the result of every item; the processes share the items if they share the embedding."""
        return distributed.share(work, items) if self._spread else [work(item) for item in items]

    def _of_images(self, embed: Callable[..., torch.Tensor], pictures: Pictures) -> torch.Tensor:
        return embed(pictures, self._batch_size, spread=self._spread)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the embeddings depend on."""
        return self.encoder.fingerprint()

    def _kept(self, kind: str, digest: Callable[[], str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        name = f"{kind}-{digest()}-{self._batch_size}"
        if name not in self._memory:
            self._memory[name] = self._filed(name, make) if self._cache else make()
        return self._memory[name]

    def _filed(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        assert self._cache is not None
        file = self._cache / self.fingerprint / f"{name}.safetensors"
        # The first process says what there is: another may look a moment later.
        kept = _read(file) if distributed.rank() == 0 or not self._spread else None
        if self._spread:
            kept = distributed.gather_objects(kept)[0]
        if kept is not None:
            return kept
        embeddings = make()
        if distributed.rank() == 0 or not self._spread:
            write_shard(file, embeddings, shared=True)  # another evaluation may write the same
        return embeddings


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
