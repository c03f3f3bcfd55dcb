"""Build an index: embed images shard by shard, go on where a killed run stopped, and embed anew what has changed.

`embeddings.json` names the files that are the index: it is replaced in one step when all of them are there.

A file is taken for the same, and is not read, where its size and both of its times are (`koclip.data.formats.files`).
Else a hash of its bytes decides, and so it does for images that are in a table.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from koclip.config import ConfigError, IndexConfig, SourceConfig, check, locate
from koclip.data.formats.files import is_folder, printable, stamp, stored_files
from koclip.data.sources import MapSource, Row, Skip, StreamSource, open_source
from koclip.data.transforms import ImageError, decode, digest_of, read
from koclip.embeddings.fill import Piece, embed_shard
from koclip.embeddings.store import NO_FILE, NO_HASH, SHARD, Entry, Item, Shard, Shards, Store
from koclip.encoders import Encoder
from koclip.search.index import FILE, build_quick
from koclip.text.normalize import usable

ROWS = 2_048  # images in a shard, at most: what a killed build loses
_QUALITY = 80  # of thumbnails
_SMALL = 128  # pixels; a browser enlarges smaller thumbnails, which makes the artefacts of JPEG visible


class Collection(NamedTuple):
    """The images to be indexed, in a fixed order: those of a folder, by their paths, or a data set's rows."""

    source: MapSource | StreamSource
    name: str
    max_images: int | None

    @classmethod
    def open(cls, config: IndexConfig) -> "Collection":
        """Open what a configuration names.

        Raises:
            SourceError: it cannot be opened, or there is no image.
        """
        kind = "pictures" if config.images and is_folder(locate(config.images)) else "auto"
        images = SourceConfig(path=config.images, format=kind, scenes_part="test", scenes_size=1_000)
        source = config.source or images
        return cls(open_source(source), printable(source.path), config.max_images or None)

    @property
    def num_images(self) -> int:
        """Number of images, 0 if it is not known before they are read."""
        size = self.source.size or 0
        return min(size, self.max_images or size)

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies this collection. It stays the same if a picture in a folder changes."""
        config = self.source.config
        if config.format == "pictures":
            names = (row.key for row in islice(self.source.iter_rows(images=False), self.max_images))
            return {"images": xxh3_128_hexdigest("\n".join(names).encode())}
        return {"images": dataclasses.asdict(config), "files": _files(config), "rows": self.num_images}

    def shards(self) -> Iterator[list[Row]]:
        """Yield the rows of each shard."""
        rows = islice(self.source.iter_rows(), self.max_images)
        while part := list(islice(rows, ROWS)):
            yield part


def build(config: IndexConfig, encoder: Encoder, directory: Path) -> tuple[int, list[Skip]]:
    """Embed what is not embedded yet or has changed since, and make the approximate index if it is asked for.

    Returns:
        The number of images in the index, and what was left out of it, by runs before this one too.

    Raises:
        ConfigError: the directory holds an index of something else, or no image can be used.
    """
    collection = Collection.open(config)
    store, facts = Store(directory, "output_dir"), _facts(config, collection, encoder)
    if store.facts() is None and any(not path.name.startswith("writing-") for path in directory.glob("*")):
        raise ConfigError(f"output_dir: {directory} holds other files; name an empty or a new directory")
    store.claim(facts, unchecked=["model"])  # the same weights may be at another path
    paths, changed = _embed(config, encoder, collection, store)
    shards = Shards(paths, store.key)
    check(len(shards) > 0, "images", config.images, f"none can be used; the first: {shards.left_out[:1]}")
    quick = directory / FILE.format(shards.checksum)
    large = config.approximate == "auto" and len(shards) >= config.approximate_from
    if (large or config.approximate == "yes") and (changed or not quick.exists()):
        build_quick(shards.rows, shards.width, quick)
    names, quick_name = [path.name for path in paths], quick.name if quick.exists() else None
    finished = {**facts, "num_images": len(shards), "shards": names, "approximate": quick_name}
    store.write_facts(finished)  # from now on, this is the index
    for path in [*directory.glob("shard-*"), *directory.glob("approximate-*"), *directory.glob("writing-*")]:
        if path.name not in (*names, quick_name):
            path.unlink()
    left_out = [Skip(key, reason, collection.name) for key, reason in shards.left_out]
    return len(shards), [*left_out, *collection.source.left_out]


def _embed(config: IndexConfig, encoder: Encoder, collection: Collection, store: Store) -> tuple[list[Path], bool]:
    """Write the shards that are missing or of other rows than now; return all that are used, and whether any is new.

    A shard takes another name than the one it takes the place of, which an index that is complete still needs.

    Raises:
        ConfigError: a shard is of more or fewer rows than belong into it now.
    """
    used: list[Path] = []
    stored: dict[int, list[Shard]] = {}  # by number, the newest first
    for path in sorted(store.path.glob("shard-*.safetensors"), key=_revision, reverse=True):
        stored.setdefault(_revision(path)[0], []).append(Shard(path, store.key))
    changed = False
    with tqdm(desc="embedding images", total=collection.num_images or None, unit=" images") as bar:
        for number, rows in enumerate(collection.shards()):
            shards = stored.pop(number, [])
            if shards and shards[0].num_items != len(rows):
                raise _resized(shards[0], len(rows))
            current = next((shard.path for shard in shards if not _stale(shard, rows)), None)
            if current:
                bar.update(len(rows))
            else:
                name = SHARD.format(number) if not shards else f"shard-{number:06}-{_revision(shards[0].path)[1] + 1}"
                current = (store.path / name).with_suffix(".safetensors")
                embed_shard(current, _pieces(rows, config, bar), _embedding(encoder), torch.bfloat16)
                changed = True
            used.append(current)
    for shards in list(stored.values())[:1]:
        raise _resized(shards[0], 0)
    return used, changed


def _revision(path: Path) -> tuple[int, int]:
    """Return a shard's number, and how often it has been replaced."""
    number, *revision = path.stem.removeprefix("shard-").split("-")
    return int(number), int(revision[0]) if revision else 0


def _facts(config: IndexConfig, collection: Collection, encoder: Encoder) -> dict[str, Any]:
    return {
        "model": config.model,
        "fingerprint": encoder.fingerprint(),
        "rows_per_shard": ROWS,
        "thumbnail_size": config.thumbnail_size,
        "max_images": config.max_images,
        "max_image_pixels": config.max_image_pixels,
        **collection.facts,
    }


def _pieces(rows: Sequence[Row], config: IndexConfig, bar: Any) -> Iterator[Piece]:
    """Yield what is read of each batch of rows."""
    for start in range(0, len(rows), config.batch_size):
        items: list[Item] = []
        pictures: list[Image.Image] = []
        entries: list[Entry] = []
        batch = rows[start : start + config.batch_size]
        for row in batch:
            item, content = _read(row)
            try:
                pixels = decode(row.image if content is None else content, config.max_image_pixels, "max_image_pixels")
            except ImageError as error:
                items.append(item._replace(reason=str(error)))
                continue
            items.append(item)
            pictures.append(to_pil_image(pixels))
            captions = {language: usable(texts) for language, texts in row.captions.items()}
            thumbnail = _thumbnail(pictures[-1], config.thumbnail_size)
            entries.append(Entry({"key": row.key, "captions": captions}, thumbnail))
        yield Piece(len(batch), items, pictures, entries)
        bar.update(len(batch))


def _embedding(encoder: Encoder) -> Any:
    """Return what embeds a piece."""

    def embed(piece: Piece) -> torch.Tensor:
        embeddings = encoder.encode_images(piece.inputs, len(piece.inputs))  # (n, D)
        finite = embeddings.isfinite().all(dim=1).tolist()
        keys = [entry.record["key"] for entry, fine in zip(piece.entries, finite, strict=True) if not fine]
        expected = "expected finite values: check the model, or take the picture out"
        check(not keys, "images, embeddings that are not finite", keys[:3], expected)
        return embeddings.unsqueeze(1)

    return embed


def _read(row: Row) -> tuple[Item, Any]:
    """Return what identifies a row's content, and the content of its image; None if it cannot be read."""
    file = _stamp(row)  # before it is read: what is written after that changes the stamp
    row_hash = xxh3_128_digest(repr((row.key, row.captions)).encode())
    try:
        content = read(row.image)
    except ImageError:
        return Item(row.key, NO_HASH, "", row_hash, file), None
    return Item(row.key, digest_of(content), "", row_hash, file), content


def _stamp(row: Row) -> tuple[int, int, int]:
    try:
        return stamp(row.image) if isinstance(row.image, Path) else NO_FILE
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return NO_FILE


def _stale(shard: Shard, rows: Sequence[Row]) -> bool:
    """Tell whether a shard is of other images or captions, and say of which."""
    keys = [row.key for item, row in zip(shard.items(), rows, strict=True) if not _same(item, row)]
    if keys:
        tqdm.write(f"{shard.path.name} is made again: {len(keys)} of its images or captions have changed: {keys[:3]}")
    return bool(keys)


def _same(item: Item, row: Row) -> bool:
    if item.row_hash != xxh3_128_digest(repr((row.key, row.captions)).encode()):
        return False
    if item.stamp != NO_FILE and item.stamp == _stamp(row):
        return True
    return _read(row)[0].digest == item.digest


def _files(source: SourceConfig) -> str:
    """Return a hash of the names and sizes of a data set's files; of one that has none here it is that of nothing."""
    files = [(str(file), file.stat().st_size) for file in stored_files(source)]
    return xxh3_128_hexdigest(repr(files).encode())


def _resized(shard: Shard, count: int) -> ConfigError:
    return ConfigError(
        f"output_dir: {shard.path.name} holds {shard.num_items} images, expected {count}: the images "
        "have changed; delete the folder and run the same command again, or name another"
    )


def _thumbnail(picture: Image.Image, side: int) -> bytes:
    """Return a JPEG whose longer side is at most `side` pixels; nothing if that is 0."""
    if not side:
        return b""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    if max(small.size) < _SMALL:
        small.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
