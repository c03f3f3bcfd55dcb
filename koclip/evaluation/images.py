"""The images of rows, decoded when they are asked for."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from xxhash import xxh3_128

from koclip.data.corruptions import corrupt
from koclip.data.sources import Row
from koclip.data.transforms import PIXEL_LIMIT, PixelLimit, decode, digest_of, read


class Pictures(Sequence[Image.Image]):
    """The images of rows, decoded when they are asked for.

    Args:
        rows: Rows whose images can be decoded.
        corruption: Name of a corruption (`koclip.data.corruptions`), its severity 1 to 5 and a seed.
        limit: The most pixels of one.
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
            return [self[one] for one in range(*place.indices(len(self)))]
        pixels = decode(self.rows[place].image, *self.limit)
        if self._corruption:
            name, severity, seed = self._corruption
            pixels = corrupt(pixels, name, severity, seed=1_000_003 * seed + place)
        picture: Image.Image = to_pil_image(pixels)
        return picture

    def corrupted(self, name: str, severity: int, seed: int) -> "Pictures":
        """Return the same images, corrupted."""
        return Pictures(self.rows, (name, severity, seed), self.limit)

    def digests(self) -> list[bytes]:
        """Return 16 bytes for each image, not corrupted, that are equal for equal content."""
        if self._digests is None:
            self._digests = [digest_of(read(row.image)) for row in self.rows]
        return self._digests

    def digest(self) -> str:
        """Return a hash of all images and of what is done to them."""
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
