"""Read texts without images: text files with one text per line, and the captions of data sets."""

import dataclasses
from collections.abc import Iterator, Sequence

from koclip.config import SourceConfig
from koclip.data.formats.files import FileError, SourceError, find, read_lines, read_text, suffix_of
from koclip.data.sources import open_source
from koclip.text.normalize import normalize, usable

_SUFFIX = ".txt"  # also compressed: .txt.gz


def read_texts(paths: Sequence[str], sources: Sequence[SourceConfig] = (), encoding: str = "utf-8") -> list[str]:
    """Return the different texts of files and data sets, clean, in the order in which they first occur.

    Args:
        paths: Text files, or data sets with the columns `captions_ko` and `captions_en`. Patterns such as `*.txt` are
            allowed.
        sources: Data sets with other columns. Their images are read for `image_range` only.
        encoding: Encoding of the text files.

    Raises:
        SourceError: a file does not exist or has another encoding, or there is no text.
    """
    texts: dict[str, None] = {}
    for path in paths:
        is_text = suffix_of(path) == _SUFFIX
        texts |= dict.fromkeys(_lines(path, encoding) if is_text else _captions(SourceConfig(path=path)))
    for source in sources:
        texts |= dict.fromkeys(_captions(source))
    texts.pop("", None)
    if not texts:
        places = [*paths, *(source.path for source in sources)]
        raise SourceError(f"texts: {', '.join(places)} have no text; expected one text per line, or captions")
    return list(texts)


def _lines(path: str, encoding: str) -> Iterator[str]:
    files = find(path)
    if not files:
        raise SourceError(f"texts: got {path!r}, which matches no file; check the path")
    for file in files:
        try:
            yield from (normalize(line) for line in read_lines(read_text(file, encoding)))
        except FileError as error:
            raise SourceError(f"texts: {error}") from error


def _captions(source: SourceConfig) -> Iterator[str]:
    # Without an image column, tables of texts can be read, too. But `image_range` needs the images.
    source = source if source.image_range else dataclasses.replace(source, image=None)
    for row in open_source(source).iter_rows(images=False):
        for captions in row.captions.values():
            yield from usable(captions)
