"""Read the images and the captions of rows as items to embed, each with a hash of its content."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from koclip.data.sources import Row
from koclip.data.transforms import ImageError, Views, decode, digest_of, read
from koclip.embeddings.store import Entry, StoredItem
from koclip.text.normalize import paired, usable

Wanted = Callable[[bytes], bool]  # whether the item with this digest is to be embedded


class ItemBatch(NamedTuple):
    """Items that are read and embedded together."""

    num_rows: int
    items: list[StoredItem]
    inputs: Any  # of the n items to embed: views (n, V, 3, H, W) uint8, texts, or images
    entries: Sequence[Entry] = ()  # index entries of the items without a `reason`
    unpaired: dict[str, int] | None = None  # see `CaptionReader`
    start: int = 0  # number of the first row


class ItemReader(Protocol):
    """Reads the items of rows."""

    images: bool  # whether it needs the rows' images

    def read(self, rows: Sequence[Row], wanted: Wanted) -> ItemBatch:
        """Return the items of rows, and the inputs of those that are `wanted`."""


class ImageReader:
    """Reads the image of each row, in `views.count` views; each image once per batch of rows."""

    images = True

    def __init__(self, views: Views, max_pixels: int) -> None:
        self._views, self._max_pixels = views, max_pixels

    def read(self, rows: Sequence[Row], wanted: Wanted) -> ItemBatch:
        """Return the images, and for each row whose image cannot be used an item with a `reason`."""
        items: list[StoredItem] = []
        inputs: list[torch.Tensor] = []
        usable_images: set[bytes] = set()
        for row in rows:
            digest, reason = digest_of(row.key.encode()), ""
            try:
                content = read(row.image)
                digest = digest_of(content)
                if digest in usable_images:  # data with a row for each caption repeat the image
                    continue
                if wanted(digest):
                    image = decode(content, self._max_pixels)
                    views = [self._views.numbered(image, digest, number) for number in range(self._views.count)]
                    inputs.append(torch.stack(views))  # (V, 3, H, W)
                usable_images.add(digest)
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

    def read(self, rows: Sequence[Row], wanted: Wanted) -> ItemBatch:
        """Return the captions."""
        texts = list(dict.fromkeys(text for row in rows for text in usable(row.captions.get(self._language, []))))
        items = [StoredItem(text[:80], digest_of(text.encode())) for text in texts]
        inputs = [text for text, item in zip(texts, items, strict=True) if wanted(item.digest)]
        return ItemBatch(len(rows), items, inputs, unpaired=self._unpaired(rows))

    def _unpaired(self, rows: Sequence[Row]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for captions in (row.captions for row in rows):
            for language, own in captions.items() if self._language in captions else ():
                pairs = paired(own, captions[self._language])
                counts[f"rows/{language}"] += pairs is None
                counts[f"captions/{language}"] += 0 if pairs is None else len(usable(own)) - len(pairs)
        return dict(counts)  # PyTorch's data loader doubles the numbers of a Counter
