"""Equal pictures are one picture with all its captions: data sets may have one row per caption."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from koclip.data.sources import Row
from koclip.data.transforms import ImageError, digest_of, read

_Captions = dict[str, list[str]]


def content_of(row: Row) -> bytes:
    """Return 16 bytes that are equal for rows of equal pictures, as training has it: encoded to the same bytes.

    A picture that cannot be read is known by its path, one that has none by its row.
    """
    try:
        return digest_of(read(row.image))
    except ImageError:
        return digest_of(str(row.image or row.key).encode(errors="surrogatepass"))


def first_rows(rows: Iterable[Row], most: int) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the first `most` rows (0: all), each with its content, and where there is another, that one with None."""
    for number, row in enumerate(rows):
        if most and number == most:
            yield row, None
            return
        yield row, content_of(row)


def first_pictures(rows: Iterable[Row], most: int, streamed: bool) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows of the first `most` pictures (0: of all), each with its content, and those of others with None.

    All rows are looked at: those of a picture need not follow each other. But if they are `streamed`, which may have no
    end, the first row of another picture is the last.
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
    """Return the rows of one picture as one, with all their captions in their order.

    Captions of two languages that correspond in a row still do, and no others.
    """
    return rows[0] if len(rows) == 1 else rows[0]._replace(captions=_joined([row.captions for row in rows]))


def _joined(rows: Sequence[_Captions]) -> _Captions:
    """Put the captions of rows one behind the other, in places of their own."""
    joined: _Captions = {language: [] for captions in rows for language in captions}
    for captions in rows:
        # Languages with unequal numbers of captions do not correspond: they get different places.
        for size in dict.fromkeys(len(own) for own in captions.values()):
            for language, places in joined.items():
                own = captions.get(language, [])
                places.extend(own if len(own) == size else [""] * size)
    return joined


def _size(row: Row) -> int:
    """Return the size of a picture's file; 0 for one that is in no file, or in none that can be read."""
    try:
        return row.image.stat().st_size if isinstance(row.image, Path) else 0
    except (OSError, ValueError):  # ValueError: no path at all
        return 0
