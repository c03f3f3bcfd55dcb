"""Build an index: embed images shard by shard, go on where a killed run stopped, and embed anew what has changed."""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from koclip.config import ConfigError, IndexConfig, SourceConfig, check, locate
from koclip.data.formats.files import is_folder, stored_files
from koclip.data.sources import Row, Skip, StreamSource, open_source
from koclip.data.transforms import KINDS, ImageError, decode
from koclip.encoders.base import Encoder
from koclip.search import approximate
from koclip.search.contents import Content, changed, look
from koclip.search.folder import list_folder, printable
from koclip.search.shards import FACTS, ROWS, SHARD, Entry, Shards, read_contents, read_facts, write, write_facts
from koclip.text.normalize import usable

FORMAT = 3  # of the files
_QUALITY = 80  # of thumbnails


class Collection:
    """The images to be indexed, in a fixed order: a folder's, by their paths, or a data set's rows.

    `left_out` are the files of a folder that no kind of picture has the suffix of.

    Raises:
        ConfigError: there is no image.
        SourceError: the data set cannot be opened.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._most = config.max_images or None
        self.name = printable(config.images if config.source is None else config.source.path)
        self._source = None
        self._paths: list[Path] = []
        self.left_out: list[Skip] = []
        if config.source is None and is_folder(locate(config.images)):
            self._root = locate(config.images)
            paths, left_out = list_folder(self._root)
            self.left_out = [skip._replace(source=self.name) for skip in left_out]
            self._paths = paths[: self._most]
            check(bool(paths), "images", config.images, f"no picture there ({KINDS}); not used: {left_out[:3]}")
            listed = [path.relative_to(self._root).as_posix() for path in self._paths]
            self.facts: dict[str, Any] = {"images": xxh3_128_hexdigest("\n".join(listed).encode("utf-8", "replace"))}
            return
        source = config.source or SourceConfig(path=config.images, scenes_part="test", scenes_size=1_000)
        self._source = open_source(source)
        self.facts = {"images": dataclasses.asdict(source), "files": _files(source), "rows": len(self)}

    def __len__(self) -> int:
        """Number of images, 0 if it is not known before they are read."""
        if isinstance(self._source, StreamSource):
            return 0
        count = len(self._paths if self._source is None else self._source)
        return min(count, self._most or count)

    def shards(self, there: Mapping[int, int]) -> Iterator[tuple[int, list[Row]]]:
        """Yield the number and the rows of every shard.

        Args:
            there: Numbers of those that are there already, and of the images that each was made of.

        Raises:
            ConfigError: one was made of more or fewer images than belong into it now.
        """
        number = -1
        for number, rows in enumerate(self._parts()):
            if there.get(number, len(rows)) != len(rows):
                raise _resized(number, there[number], len(rows))
            yield number, rows
        for beyond in [one for one in there if one > number][:1]:
            raise _resized(beyond, there[beyond], 0)

    def _parts(self) -> Iterator[list[Row]]:
        """Yield the rows of each shard."""
        if isinstance(self._source, StreamSource):
            rows = islice(self._source.iter_rows(), self._most)
            while part := list(islice(rows, ROWS)):
                yield part
            return
        for start in range(0, len(self), ROWS):
            yield self._read(range(start, min(start + ROWS, len(self))))

    def _read(self, places: range) -> list[Row]:
        if self._source is not None and not isinstance(self._source, StreamSource):
            return self._source.rows(places)
        return [
            Row(path, {}, printable(path.relative_to(self._root).as_posix()))
            for path in self._paths[places.start : places.stop]
        ]


def build(config: IndexConfig, encoder: Encoder, directory: Path) -> tuple[int, list[Skip]]:
    """Embed what is not embedded yet or has changed since, and make the approximate index if it is asked for.

    Returns:
        The number of images in the index, and what was left out of it, by runs before this one too.

    Raises:
        ConfigError: the directory holds an index of something else, or no image can be used.
    """
    collection = Collection(config)
    facts, quick = _claim(directory, config, collection, encoder), directory / approximate.FILE
    paths = {int(path.stem.split("-")[1]): path for path in sorted(directory.glob(SHARD.replace("{:06}", "*")))}
    there = {number: len(read_contents(path)) for number, path in paths.items()}
    with tqdm(desc="embedding images", total=len(collection) or None, unit=" images") as bar:
        for number, rows in collection.shards(there):
            if number in there and not _stale(paths[number], rows):
                bar.update(len(rows))
                continue
            quick.unlink(missing_ok=True)  # made of other rows
            paths[number] = directory / SHARD.format(number)
            _embed(paths[number], rows, encoder, config, (collection.name, bar))
    shards = Shards([paths[number] for number in sorted(paths)])
    check(len(shards) > 0, "images", config.images, f"none can be used; the first: {shards.skipped[:1]}")
    large = config.approximate == "auto" and len(shards) >= config.approximate_from
    if (large or config.approximate == "yes") and not quick.exists():
        approximate.build(shards.rows, shards.width, quick)
    write_facts(directory, {**facts, "num_images": len(shards), "num_shards": len(paths)})
    return len(shards), [*shards.skipped, *collection.left_out]


def _stale(path: Path, rows: list[Row]) -> bool:
    """Tell whether a shard was made of other images or captions, and say of which."""
    keys = changed(read_contents(path), rows)
    if keys:
        tqdm.write(f"{path.name} is made again: {len(keys)} of its images or captions have changed: {keys[:3]}")
    return bool(keys)


def _files(source: SourceConfig) -> str:
    """Return a hash of the names and sizes of a data set's files; of one that has none here it is that of nothing."""
    files = [(str(file), file.stat().st_size) for file in stored_files(source)]
    return xxh3_128_hexdigest(repr(files).encode())


def _resized(number: int, held: int, count: int) -> ConfigError:
    return ConfigError(
        f"output_dir: {SHARD.format(number)} was made of {held} images, but {count} belong into it: the images have "
        "changed since; delete the folder and run the same command again, or name another"
    )


def _claim(directory: Path, config: IndexConfig, collection: Collection, encoder: Encoder) -> dict[str, Any]:
    """Make a directory the place of this index; return the facts."""
    facts = {
        "format": FORMAT,
        "model": config.model,
        "fingerprint": encoder.fingerprint(),
        "rows_per_shard": ROWS,
        "thumbnail_size": config.thumbnail_size,
        "max_images": config.max_images,
        "max_image_pixels": config.max_image_pixels,
        **collection.facts,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / FACTS).exists():
        theirs = read_facts(directory)
        # The same weights may lie elsewhere.
        differing = [name for name in facts if name != "model" and theirs.get(name) != facts[name]]
        if differing:
            told = "; ".join(f"{name}: {theirs.get(name)}, here {facts[name]}" for name in differing)
            raise ConfigError(
                f"output_dir: the index in {directory} was made otherwise ({told}); delete it or name another"
            )
    elif any(directory.iterdir()):
        raise ConfigError(f"output_dir: {directory} holds other files; name an empty or a new directory")
    write_facts(directory, facts)
    return facts


def _embed(path: Path, rows: list[Row], encoder: Encoder, config: IndexConfig, shown: "tuple[str, tqdm[Any]]") -> None:
    """Write the shard of these rows; `shown` are the collection's name and the progress bar."""
    name, bar = shown
    entries: list[Entry] = []
    made: list[torch.Tensor] = []
    skipped: list[Skip] = []
    contents: list[Content] = []
    for start in range(0, len(rows), config.batch_size):
        batch = []
        for content, row in map(look, rows[start : start + config.batch_size]):
            contents.append(content)
            try:
                pixels = decode(row.image, config.max_image_pixels, "max_image_pixels")
            except ImageError as error:
                skipped.append(Skip(row.key, str(error), name))
                continue
            batch.append(to_pil_image(pixels))
            captions = {language: usable(texts) for language, texts in row.captions.items()}
            entries.append(Entry({"key": row.key, "captions": captions}, _thumbnail(batch[-1], config.thumbnail_size)))
        if batch:
            made.append(encoder.encode_images(batch))
            finite = made[-1].isfinite().all(dim=1).tolist()
            keys = [one.record["key"] for one, fine in zip(entries[-len(batch) :], finite, strict=True) if not fine]
            told = "expected finite values: check the model, or take the picture out"
            check(not keys, "images, embeddings that are not finite", keys[:3], told)
        bar.update(len(rows[start : start + config.batch_size]))
    write(path, torch.cat(made) if made else torch.zeros(0, 0), entries, skipped, contents)


def _thumbnail(picture: Image.Image, side: int) -> bytes:
    """Return a JPEG whose longer side is at most `side` pixels; nothing if that is 0."""
    if not side:
        return b""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
