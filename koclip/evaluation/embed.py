"""Embed whole data sets once, cache the embeddings by model and data, and rank them in several processes.

Rows with equal images become one image with all their captions; `Images` decodes images when they are needed.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm
from xxhash import xxh3_128, xxh3_128_hexdigest

from koclip import distributed, metrics
from koclip.config import ConfigError
from koclip.data.sources import Row
from koclip.data.transforms import PIXEL_LIMIT, ImageError, PixelLimit, corrupt, decode, digest_of, read
from koclip.embeddings.store import Shard, write_shard
from koclip.encoders import Encoder


class Images(Sequence[Image.Image]):
    """The images of rows, decoded at each access.

    Args:
        rows: Rows whose images can be decoded.
        corruption: Name of a corruption (`koclip.data.transforms`), its severity 1 to 5 and a seed.
        limit: The largest number of pixels of an image.
    """

    def __init__(
        self, rows: Sequence[Row], corruption: tuple[str, int, int] | None = None, limit: PixelLimit = PIXEL_LIMIT
    ) -> None:
        self.rows, self._corruption, self.limit = rows, corruption, limit

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Image.Image: ...
    @overload
    def __getitem__(self, place: slice) -> list[Image.Image]: ...
    def __getitem__(self, place: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        pixels = decode(self.rows[place].image, *self.limit)
        if self._corruption:
            name, severity, seed = self._corruption
            pixels = corrupt(pixels, name, severity, seed=1_000_003 * seed + place)
        image: Image.Image = to_pil_image(pixels)
        return image

    def corrupted(self, name: str, severity: int, seed: int) -> "Images":
        """Return the same images, corrupted."""
        return Images(self.rows, (name, severity, seed), self.limit)

    @cached_property
    def digests(self) -> list[bytes]:
        """A hash of 16 bytes for each image, without the corruption."""
        return [digest_of(read(row.image)) for row in self.rows]

    @cached_property
    def digest(self) -> str:
        """A hash of all images and of the corruption."""
        digest = xxh3_128(repr(self._corruption).encode())
        for row in self.rows:
            content = read(row.image)
            if isinstance(content, np.ndarray):
                digest.update(repr(content.shape).encode())
                content = content.tobytes()
            digest.update(content)
            digest.update(b"|")
        return digest.hexdigest()


def _content_of(row: Row) -> bytes:
    """Return a hash (16 bytes) of a row's encoded image; of its path if it is unreadable, of the key if it has none."""
    try:
        return digest_of(read(row.image))
    except ImageError:
        return digest_of(str(row.image or row.key).encode(errors="surrogatepass"))


def first_rows(rows: Iterable[Row], most: int) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the first `most` rows (0: all) with the hash of their image, and the next row, if any, with None."""
    for number, row in enumerate(rows):
        if most and number == most:
            yield row, None
            return
        yield row, _content_of(row)


def first_images(rows: Iterable[Row], most: int, streamed: bool) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows of the first `most` images (0: all) with the hash of their image, and all other rows with None.

    All rows are read, because the rows of an image may be far apart. A stream may have no end: if `streamed`, reading
    stops at the first row of another image.
    """
    taken: set[bytes] = set()
    sizes: set[int] = set()
    for row in rows:
        full = bool(most) and len(taken) == most
        # A file whose size is new has new content, so it need not be read.
        content = None if full and not streamed and _size(row) not in sizes else _content_of(row)
        if full and content not in taken:
            yield row, None
            if streamed:
                return
            continue
        assert content is not None
        taken.add(content)
        sizes.add(_size(row))
        yield row, content


def merged(rows: Sequence[Row]) -> Row:
    """Return the rows of an image as one row with all their captions, in order.

    Captions of two languages are at the same index exactly if they correspond in a row.
    """
    if len(rows) == 1:
        return rows[0]
    joined: dict[str, list[str]] = {language: [] for row in rows for language in row.captions}
    for row in rows:
        # Languages with unequal numbers of captions do not correspond, so they get different indices.
        for size in dict.fromkeys(map(len, row.captions.values())):
            for language, places in joined.items():
                own = row.captions.get(language, [])
                places.extend(own if len(own) == size else [""] * size)
    return rows[0]._replace(captions=joined)


def _size(row: Row) -> int:
    """Return the size of an image's file in bytes; 0 without a file or if it cannot be read."""
    try:
        return row.image.stat().st_size if isinstance(row.image, Path) else 0
    except (OSError, ValueError):  # ValueError: not a path
        return 0


Item = TypeVar("Item")
Result = TypeVar("Result")
_QUERIES = 4_096  # ranked at once; independent of the number of processes, so that the result is, bit for bit


@dataclass(frozen=True)
class UniqueCaptions:
    """Distinct captions and their images. Equal captions are one caption with several images."""

    texts: list[str]  # captions of images first, then captions that are in the gallery only
    images: list[list[int]]  # by caption of an image: the indices of its images
    texts_of: list[list[int]]  # by image: the indices of its captions


def collect(captions: list[list[str]], gallery: list[str]) -> UniqueCaptions:
    """Return the distinct captions of the images and of the gallery."""
    place = {text: number for number, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    images: list[list[int]] = [[] for _ in place]
    for image, own in enumerate(captions):
        for text in dict.fromkeys(own):
            images[place[text]].append(image)
    others = [text for text in dict.fromkeys(gallery) if text not in place]
    texts_of = [[place[text] for text in dict.fromkeys(own)] for own in captions]
    return UniqueCaptions([*place, *others], images, texts_of)


def search(
    queries: torch.Tensor, gallery: torch.Tensor, positives: Sequence[Sequence[int]], spread: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank and the nearest entry (Q,) of queries (Q, D) in a gallery (G, D), as `koclip.metrics.search`.

    `positives` has the indices of the right entries of each query, at least one. If `spread`, the processes share the
    queries, and all of them must call this.
    """
    parts = [slice(start, start + _QUERIES) for start in range(0, len(queries), _QUERIES)]
    results = share(lambda part: metrics.search(queries[part], gallery, positives[part]), parts, spread)
    return torch.cat([ranks for ranks, _ in results]), torch.cat([nearest for _, nearest in results])


def share(work: Callable[[Item], Result], items: Sequence[Item], spread: bool) -> list[Result]:
    """Return the result of every item; if `spread`, the processes share the items, and all of them must call this."""
    return distributed.share(work, items) if spread else [work(item) for item in items]


class Embedder:
    """Embeds with one encoder and caches the embeddings.

    Args:
        encoder: The model. It must not change while this object is used.
        batch_size: Images or texts encoded at once.
        cache: Folder for the embeddings, in files named by hashes of the model (of its image side, for images) and of
            the data; default: in memory.
        spread: Share the work among the processes; all of them must call the same methods. The batches, and so the
            embeddings, do not depend on the number of processes, bit for bit.
    """

    def __init__(self, encoder: Encoder, batch_size: int, cache: Path | None = None, spread: bool = False) -> None:
        self.encoder, self.spread, self.batch_size, self._cache = encoder, spread, batch_size, cache
        self._memory: dict[str, torch.Tensor] = {}  # several tasks and languages use the same embeddings
        self._same_images: Embedder | None = None  # see `share_images`

    def share_images(self, other: "Embedder", sample: Sequence[Image.Image]) -> bool:
        """Use the image embeddings of `other` if both models embed `sample` the same, bit for bit; return whether."""
        embedded = [embedder.encoder.encode_images(list(sample), self.batch_size) for embedder in (self, other)]
        equal = embedded[0].shape == embedded[1].shape and torch.equal(*embedded)
        self._same_images = other if equal else None
        return equal

    def alone(self) -> "Embedder":
        """Return a copy for one process, which calls no collective and shares the cache."""
        other = copy.copy(self)
        other.spread, other._memory = False, dict(self._memory)  # a copy: the memory of all processes stays the same
        return other

    def images(self, images: Images) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        if self._same_images is not None:
            return self._same_images.images(images)
        return self._cached("images", images.digest, self.encoder.encode_images, images)

    def features(self, images: Images) -> torch.Tensor:
        """Return (N, W) features before the projection."""
        return self._cached("features", images.digest, self.encoder.image_features, images)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (N, D) unit-norm embeddings."""
        # Raw: how a model embeds decomposed text is measured too.
        embed = functools.partial(self.encoder.encode_texts, raw=True)
        return self._cached("texts", xxh3_128_hexdigest(repr(list(texts)).encode()), embed, texts)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the embeddings depend on."""
        return self.encoder.fingerprint()

    @cached_property
    def _image_fingerprint(self) -> str:
        return self.encoder.image_fingerprint()

    def _folder(self, kind: str) -> str:
        """Return the folder of embeddings in the cache; models with the same image side share those of images."""
        return self.fingerprint if kind == "texts" else self._image_fingerprint

    def _cached(self, kind: str, digest: str, embed: Callable[..., torch.Tensor], items: Sequence[Any]) -> torch.Tensor:
        name = f"{kind}-{digest}-{self.batch_size}"
        if name not in self._memory:
            file = self._cache / self._folder(kind) / f"{name}.safetensors" if self._cache else None
            is_first = distributed.rank() == 0 or not self.spread
            stored = _read(file) if file and is_first else None
            if file and self.spread:  # the first process decides: another process may look after a file appears
                stored = distributed.gather_objects(stored)[0]
            if stored is None:
                stored = embed(items, self.batch_size, spread=self.spread)
                if file and is_first:
                    write_shard(file, stored, shared=True)  # another evaluation may write the same file
            self._memory[name] = stored
        return self._memory[name]


def _read(file: Path) -> torch.Tensor | None:
    """Return the embeddings in a file, None without one. A broken file is reported, and its embeddings recomputed."""
    try:
        if not file.exists():
            return None
        shard = Shard(file, "cache_dir")
        shard.verify()
        return shard.embeddings
    except ConfigError as error:
        tqdm.write(str(error))
        return None
