"""Which images a run was trained on: 8 bytes of each image's content, so that an evaluation can tell what is not new.

Each process keeps a sorted file of its own in `<run>/training_pictures/`, written anew with every checkpoint; a million
images take 8 MB. Of images that a killed process saw after its last checkpoint, those count that the run sees again.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from koclip import distributed, storage
from koclip.data.batches import Batch
from koclip.data.transforms import image_id

_FOLDER = "training_pictures"
_WAITING = 1_000_000  # ids that are sorted in at once

Ids = npt.NDArray[np.int64]


class TrainingPictures:
    """The images of one process's batches.

    Args:
        run: The run's directory.
        begins: Whether the run is at its first step. One that went on without these files has none: what it was
            trained on before is not known.
    """

    def __init__(self, run: Path, begins: bool) -> None:
        folder = run / _FOLDER
        if begins and distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        distributed.barrier()
        self._file = folder / f"{distributed.rank():05}.npy" if folder.is_dir() else None
        self._known = np.load(self._file) if self._file and self._file.exists() else np.empty(0, np.int64)
        self._waiting: list[Ids] = []
        self._count = 0

    def add(self, batch: Batch) -> None:
        """Note a batch's images, if it has any."""
        if self._file is None or (batch.pixel_values is None and batch.image is None):
            return
        self._waiting.append(batch.pair_ids[:, 1].numpy().copy())  # not the whole pinned batch
        self._count += len(batch.pair_ids)
        if self._count > _WAITING:
            self._sort_in()

    def write(self) -> None:
        """Bring the file up to date; a reader sees the old file or the new file."""
        if self._file is None:
            return
        self._sort_in()
        with storage.atomic(self._file) as partial, partial.open("wb") as opened:
            np.save(opened, self._known)

    def _sort_in(self) -> None:
        self._known = np.unique(np.concatenate([self._known, *self._waiting]))
        self._waiting, self._count = [], 0


def read_ids(run: Path) -> Ids | None:
    """Return the ids of all images that a run was trained on, sorted; None if it has not kept them."""
    files = sorted((run / _FOLDER).glob("*.npy"))
    return np.unique(np.concatenate([np.load(file) for file in files])) if files else None


def count(ids: Ids, digests: Sequence[bytes]) -> int:
    """Return how many images, by their digests, are among those of `read_ids`."""
    if not len(ids) or not digests:
        return 0
    own = np.array([image_id(digest) for digest in digests], dtype=np.int64)
    places = np.searchsorted(ids, own).clip(max=len(ids) - 1)
    return int((ids[places] == own).sum())


def of_model(model: str) -> tuple[Ids | None, list[str]]:
    """Return the images that a model was trained on, and the models whose training images are not known here.

    Those are the model itself and the models it was built from, as far as their runs lie here.

    Args:
        model: A model's directory, with its run around it; anything else is not known.
    """
    run = Path(model).resolve().parent
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if Path(model).is_dir() and file.is_file() else {}
    own = read_ids(run) if config else None
    known, unknown = [] if own is None else [own], [_short(model)] if own is None else []
    section = config.get("model")  # of an evaluation, a name
    base = section.get("clip") if isinstance(section, dict) else None
    if base:
        more, others = of_model(base)
        known, unknown = known + ([] if more is None else [more]), unknown + others
    return np.unique(np.concatenate(known)) if known else None, unknown


def _short(model: str) -> str:
    """Return a Hub id as it is, and of a path its last two parts: the others are this machine's."""
    return "/".join(Path(model).parts[-2:]) if Path(model).exists() else model
