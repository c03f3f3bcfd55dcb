"""The images of rows, decoded when they are asked for; rows of equal images are one image with all their captions."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from xxhash import xxh3_128

from koclip.data.sources import Row
from koclip.data.transforms import PIXEL_LIMIT, ImageError, PixelLimit, corrupt, decode, digest_of, read

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
