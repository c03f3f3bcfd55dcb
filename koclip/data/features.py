"""Features that a frozen tower makes of the data once: of images, or of sentences.

They lie in shards of safetensors that are memory-mapped, in `<directory>/<source>/`, one per `ROWS` rows of a source,
found by a hash of what they were made of (the image's bytes, the sentence). `features.json` says which tower and which
views made them: a directory made by others is refused, and so is one whose rows have changed.

A shard is there whole or not at all, and made of the same rows in the same batches by any number of processes: building
can be stopped and go on, and gives the same bytes.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from koclip import storage
from koclip.config import ConfigError
from koclip.data.batches import MissingError

ROWS = 1_024  # of a source in a shard
SHARD = "shard-{:06}.safetensors"


class Item(NamedTuple):
    """Something that features are made of."""

    digest: bytes  # 16 of them
    key: str  # the row's
    reason: str = ""  # why it has no features, if it has none


Inputs = torch.Tensor | list[str]


class Piece(NamedTuple):
    """What is read of some rows, and embedded, at a time."""

    num_rows: int
    items: list[Item]
    inputs: Inputs  # views (n, V, 3, H, W) uint8, or sentences, of the n items that have features
    apart: dict[str, int] | None = None  # what of it does not correspond, see `Sentences`


Embed = Callable[[Inputs], torch.Tensor]


class Features:
    """The features in a directory, memory-mapped.

    Args:
        shards: The files.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        loaded = [load_file(shard) for shard in shards]  # maps the file, reads nothing
        self._features = [one["features"] for one in loaded]  # (n, V, D) each
        self._reasons = {number: reasons for number, shard in enumerate(shards) if (reasons := _reasons(shard))}
        keys = np.concatenate([_keys(one["digests"].numpy()) for one in loaded])
        self._order = np.argsort(keys)
        self._keys = keys[self._order]
        self._starts = np.cumsum([0, *(len(one) for one in self._features)])

    def __len__(self) -> int:
        return len(self._keys)

    def embedding(self, digest: bytes, view: int = 0) -> torch.Tensor:
        """Return the features (D,) float32 of a view of what has this digest.

        Raises:
            MissingError: it had none to be made of, for the reason given.
            ConfigError: it was not there when the features were made.
        """
        key = np.frombuffer(digest, dtype="S16")[0]
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise ConfigError(
                "align.cache_dir: the data changed while the run was going on: the cached features were not made of "
                "one of its images or sentences; start again with another directory"
            )
        place = int(self._order[place])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        row = place - int(self._starts[number])
        if reason := self._reasons.get(number, {}).get(str(row)):
            raise MissingError(reason)
        return self._features[number][row, view].float()


def claim(directory: Path, facts: dict[str, str]) -> None:
    """Make a directory the place of features of this tower and these views; call it on one process.

    Raises:
        ConfigError: it holds others. The message says in what they differ.
    """
    record = directory / "features.json"
    if record.exists():
        try:
            theirs = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"align.cache_dir: {record} is broken: {error}; delete {directory}") from error
        differing = [name for name in facts | theirs if facts.get(name) != theirs.get(name)]
        if differing:
            told = "; ".join(f"{name}: {theirs.get(name)}, here {facts.get(name)}" for name in differing)
            raise ConfigError(
                f"align.cache_dir: the features in {directory} were made otherwise ({told}); delete it or name another"
            )
        return
    storage.replace_text(record, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def check(shard: Path, items: Sequence[Item]) -> None:
    """Make sure that a shard was made of these items.

    Raises:
        ConfigError: it was made of others, or cannot be read.
    """
    try:
        with safe_open(shard, framework="np") as file:
            digests = file.get_tensor("digests")
            if _notes(file)["checksum"] != _checksum(digests, file.get_tensor("features")):
                raise ValueError("it does not have the checksum it was written with")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"align.cache_dir: {shard} is broken: {error}; delete it, it will be made again") from error
    ours, theirs = _keys(_digests(items)), _keys(digests)
    if np.array_equal(theirs, ours):
        return
    where = f"it has {len(ours)} entries, {len(theirs)} then"
    if len(theirs) == len(ours):
        where = f"the first that differs is {items[int(np.argmax(theirs != ours))].key}"
    raise ConfigError(
        f"align.cache_dir: the data has changed since {shard} was made: {where}; delete {shard.parent} or name another "
        "directory"
    )


def write(path: Path, pieces: Iterable[Piece], embed: Embed, dtype: torch.dtype) -> None:
    """Make the features of some pieces, one at a time, and write them; the shard is there whole or not at all."""
    items: list[Item] = []
    made: dict[int, torch.Tensor] = {}
    for piece in pieces:
        usable = [place for place, item in enumerate(piece.items, start=len(items)) if not item.reason]
        items += piece.items
        if usable:
            made |= dict(zip(usable, embed(piece.inputs).to(dtype).cpu(), strict=True))
    features = torch.zeros(len(items), *(next(iter(made.values())).shape if made else (1, 0)), dtype=dtype)
    for place, one in made.items():
        features[place] = one
    reasons = {str(place): item.reason for place, item in enumerate(items) if item.reason}
    digests = _digests(items)
    notes = {"reasons": reasons, "checksum": _checksum(digests, features.numpy())}
    # One entry: safetensors writes several in any order.
    metadata = {"notes": json.dumps(notes, ensure_ascii=False)}
    with storage.atomic(path) as partial:
        save_file({"digests": torch.from_numpy(digests), "features": features}, partial, metadata=metadata)


def _digests(items: Sequence[Item]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(item.digest for item in items), dtype=np.uint8).reshape(-1, 16).copy()


def _checksum(*arrays: npt.NDArray[Any]) -> str:
    return " ".join(xxhash.xxh3_128_hexdigest(one.tobytes()) for one in arrays)


def _keys(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """Return (n, 16) bytes as n keys that sort."""
    return np.ascontiguousarray(digests).view("S16").reshape(-1)


def _notes(file: Any) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(file.metadata()["notes"])
    return notes


def _reasons(shard: Path) -> dict[str, str]:
    with safe_open(shard, framework="np") as file:
        reasons: dict[str, str] = _notes(file)["reasons"]
    return reasons
