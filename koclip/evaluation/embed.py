"""Embed whole data sets, each once, and keep the embeddings on disk by model and data; rank them in several processes.

`Images` decodes images when they are needed; rows with equal images become one image with all their captions.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

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

_Captions = dict[str, list[str]]


class Images(Sequence[Image.Image]):
    """The images of rows, decoded when they are asked for.

    Args:
        rows: Rows whose images can be decoded.
        corruption: Name of a corruption (`koclip.data.transforms`), its severity 1 to 5 and a seed.
        limit: The most pixels of an image.
    """

    def __init__(
        self, rows: Sequence[Row], corruption: tuple[str, int, int] | None = None, limit: PixelLimit = PIXEL_LIMIT
    ) -> None:
        self.rows, self._corruption, self.limit = rows, corruption, limit
        self._digest: str | None = None
        self._digests: list[bytes] | None = None

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

    def digests(self) -> list[bytes]:
        """Return 16 bytes for each image, not corrupted, that are equal for equal content."""
        if self._digests is None:
            self._digests = [digest_of(read(row.image)) for row in self.rows]
        return self._digests

    def digest(self) -> str:
        """Return a hash of all images and of the corruption."""
        if self._digest is None:
            digest = xxh3_128(repr(self._corruption).encode())
            for row in self.rows:
                content = read(row.image)
                if isinstance(content, np.ndarray):
                    digest.update(repr(content.shape).encode())
                    content = content.tobytes()
                digest.update(content)
                digest.update(b"|")
            self._digest = digest.hexdigest()
        return self._digest


def content_of(row: Row) -> bytes:
    """Return 16 bytes that are equal for rows of equal images, as in training: encoded to the same bytes.

    An image that cannot be read is identified by its path; a row without an image by its key.
    """
    try:
        return digest_of(read(row.image))
    except ImageError:
        return digest_of(str(row.image or row.key).encode(errors="surrogatepass"))


def first_rows(rows: Iterable[Row], most: int) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the first `most` rows (0: all), each with its content, and the next row, if there is one, with None."""
    for number, row in enumerate(rows):
        if most and number == most:
            yield row, None
            return
        yield row, content_of(row)


def first_images(rows: Iterable[Row], most: int, streamed: bool) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows of the first `most` images (0: of all), each with its content, and rows of other images with None.

    All rows are read, because rows of an image need not follow each other. But a stream may have no end: if the rows
    are `streamed`, the first row of another image is the last.
    """
    taken: set[bytes] = set()
    sizes: set[int] = set()
    for row in rows:
        full = bool(most) and len(taken) == most
        # A file of another size has another content, and need not be read.
        content = None if full and not streamed and _size(row) not in sizes else content_of(row)
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
    """Return the rows of an image as one row, with all their captions in their order.

    Captions of two languages that correspond in a row still correspond, and no others do.
    """
    return rows[0] if len(rows) == 1 else rows[0]._replace(captions=_joined([row.captions for row in rows]))


def _joined(rows: Sequence[_Captions]) -> _Captions:
    """Put the captions of rows behind each other, in places of their own."""
    joined: _Captions = {language: [] for captions in rows for language in captions}
    for captions in rows:
        # Languages with unequal numbers of captions do not correspond: they get different places.
        for size in dict.fromkeys(len(own) for own in captions.values()):
            for language, places in joined.items():
                own = captions.get(language, [])
                places.extend(own if len(own) == size else [""] * size)
    return joined


def _size(row: Row) -> int:
    """Return the size of an image's file in bytes; 0 if it is in no file, or in none that can be read."""
    try:
        return row.image.stat().st_size if isinstance(row.image, Path) else 0
    except (OSError, ValueError):  # ValueError: not a path
        return 0


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
