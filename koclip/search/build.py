"""Build an index: embed images shard by shard, continue after an interruption, and replace shards that have changed.

`embeddings.json` names the files of the index. It is replaced atomically when all of them are complete.

An image file with the same size, mtime and ctime (`koclip.data.formats.files`) is unchanged, and is not read. For other
files, and for images in a table, a hash of the bytes is compared.
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
from koclip.embeddings.fill import Embed, embed_shard
from koclip.embeddings.readers import ItemBatch
from koclip.embeddings.store import NO_FILE, NO_HASH, SHARD, Entry, Shard, Shards, Store, StoredItem
from koclip.encoders import Encoder
from koclip.search.index import FILE, build_approximate
from koclip.text.normalize import usable

ROWS = 2_048  # images in a shard: a killed build loses at most these
_QUALITY = 80  # JPEG quality of thumbnails
_SMALL = 128  # pixels; a browser enlarges smaller thumbnails, which makes the artefacts of JPEG visible


class Collection(NamedTuple):
    """The images to index, in a fixed order: the files of a folder by path, or the rows of a data set."""

    source: MapSource | StreamSource
    name: str
    max_images: int | None

    @classmethod
    def open(cls, config: IndexConfig) -> "Collection":
        """Open the images of a configuration.

        Raises:
            SourceError: the source cannot be opened, or has no image.
        """
        kind = "pictures" if config.images and is_folder(locate(config.images)) else "auto"
        images = SourceConfig(path=config.images, format=kind, scenes_part="test", scenes_size=1_000)
        source = config.source or images
        return cls(open_source(source), printable(source.path), config.max_images or None)

    @property
    def num_images(self) -> int:
        """Number of images; 0 if it is not known before they are read."""
        size = self.source.size or 0
        return min(size, self.max_images or size)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that identify the collection. They do not change if an image in a folder changes."""
        config = self.source.config
        if config.format == "pictures":
            names = (row.key for row in islice(self.source.iter_rows(images=False), self.max_images))
            return {"images": xxh3_128_hexdigest("\n".join(names).encode())}
        files = [(str(file), file.stat().st_size) for file in stored_files(config)]  # none for a data set on the Hub
        return {
            "images": dataclasses.asdict(config),
            "files": xxh3_128_hexdigest(repr(files).encode()),
            "rows": self.num_images,
        }

    def shards(self) -> Iterator[list[Row]]:
        """Yield the rows of each shard."""
        rows = islice(self.source.iter_rows(), self.max_images)
        while part := list(islice(rows, ROWS)):
            yield part


def build(config: IndexConfig, encoder: Encoder, directory: Path) -> tuple[int, list[Skip]]:
    """Embed new and changed images, and build the approximate index if the configuration wants it.

    Returns:
        The number of images in the index, and the images that were left out, in this run or an earlier run.

    Raises:
        ConfigError: the directory holds an index of other images or with other settings, or no image can be used.
    """
    collection = Collection.open(config)
    store, facts = Store(directory, "output_dir"), _facts(config, collection, encoder)
    if store.facts() is None and any(not path.name.startswith("writing-") for path in directory.glob("*")):
        raise ConfigError(f"output_dir: {directory} holds other files; name an empty or a new directory")
    store.claim(facts, unchecked=["model"])  # the same weights may be at another path
    paths, changed = _embed(config, encoder, collection, store)
    shards = Shards(paths, store.key)
    check(len(shards) > 0, "images", config.images, f"none can be used; the first: {shards.left_out[:1]}")
    approximate = directory / FILE.format(shards.checksum)
    large = config.approximate == "auto" and len(shards) >= config.approximate_from
    if (large or config.approximate == "yes") and (changed or not approximate.exists()):
        build_approximate(shards.rows, shards.width, approximate)
    names, approximate_name = [path.name for path in paths], approximate.name if approximate.exists() else None
    finished = {**facts, "num_images": len(shards), "shards": names, "approximate": approximate_name}
    finished["calibration"] = _kept_calibration(store, shards)
    store.write_facts(finished)  # the new index replaces the old index here
    for path in [*directory.glob("shard-*"), *directory.glob("approximate-*"), *directory.glob("writing-*")]:
        if path.name not in (*names, approximate_name):
            path.unlink()
    left_out = [Skip(key, reason, collection.name) for key, reason in shards.left_out]
    return len(shards), [*left_out, *collection.source.left_out]


def _kept_calibration(store: Store, shards: Shards) -> dict[str, Any] | None:
    """Return the calibration of the index (`koclip.search.calibrate`) if it is one of these embeddings."""
    calibration: dict[str, Any] | None = (store.facts() or {}).get("calibration")
    if calibration is None or calibration["embeddings"] == shards.checksum:
        return calibration
    tqdm.write("the images of the index have changed: its thresholds are removed, until it is calibrated again")
    return None


def _embed(config: IndexConfig, encoder: Encoder, collection: Collection, store: Store) -> tuple[list[Path], bool]:
    """Write the shards that are missing or have changed; return all shards of the index, and whether any is new.

    A changed shard gets a new name, because a finished index still uses the old file.

    Raises:
        ConfigError: the number of rows in a shard has changed.
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
                embed_shard(current, _batches(rows, config, bar), _embed_with(encoder), torch.bfloat16)
                changed = True
            used.append(current)
    for shards in list(stored.values())[:1]:
        raise _resized(shards[0], 0)
    return used, changed


def _revision(path: Path) -> tuple[int, int]:
    """Return a shard's number, and the number of times it was replaced."""
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


def _batches(rows: Sequence[Row], config: IndexConfig, bar: Any) -> Iterator[ItemBatch]:
    """Read the rows of a shard, batch by batch."""
    for start in range(0, len(rows), config.batch_size):
        items: list[StoredItem] = []
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
        yield ItemBatch(len(batch), items, pictures, entries)
        bar.update(len(batch))


def _embed_with(encoder: Encoder) -> Embed:
    """Return a function that embeds a batch and checks that the embeddings are finite."""

    def embed(batch: ItemBatch) -> torch.Tensor:
        embeddings = encoder.encode_images(batch.inputs, len(batch.inputs))  # (n, D)
        finite = embeddings.isfinite().all(dim=1).tolist()
        keys = [entry.record["key"] for entry, fine in zip(batch.entries, finite, strict=True) if not fine]
        expected = "expected finite values: check the model, or remove the image"
        check(not keys, "images, embeddings that are not finite", keys[:3], expected)
        return embeddings.unsqueeze(1)

    return embed


def _read(row: Row) -> tuple[StoredItem, Any]:
    """Return the item of a row, and the content of its image; None if it cannot be read."""
    file = _stamp(row)  # before reading: a write after this changes the stamp
    row_hash = xxh3_128_digest(repr((row.key, row.captions)).encode())
    try:
        content = read(row.image)
    except ImageError:
        return StoredItem(row.key, NO_HASH, "", row_hash, file), None
    return StoredItem(row.key, digest_of(content), "", row_hash, file), content


def _stamp(row: Row) -> tuple[int, int, int]:
    try:
        return stamp(row.image) if isinstance(row.image, Path) else NO_FILE
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return NO_FILE


def _stale(shard: Shard, rows: Sequence[Row]) -> bool:
    """Return whether images or captions of a shard have changed; print their keys."""
    keys = [row.key for item, row in zip(shard.items(), rows, strict=True) if not _same(item, row)]
    if keys:
        tqdm.write(f"{shard.path.name} is built again: {len(keys)} images or captions have changed: {keys[:3]}")
    return bool(keys)


def _same(item: StoredItem, row: Row) -> bool:
    if item.row_hash != xxh3_128_digest(repr((row.key, row.captions)).encode()):
        return False
    if item.stamp != NO_FILE and item.stamp == _stamp(row):
        return True
    return _read(row)[0].digest == item.digest


def _resized(shard: Shard, count: int) -> ConfigError:
    return ConfigError(
        f"output_dir: {shard.path.name} holds {shard.num_items} images, expected {count}: images were added or "
        "removed; delete the directory and run the same command again, or name another directory"
    )


def _thumbnail(picture: Image.Image, side: int) -> bytes:
    """Return a JPEG whose longer side is at most `side` pixels; no bytes if `side` is 0."""
    if not side:
        return b""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side))
    if max(small.size) < _SMALL:
        small.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
