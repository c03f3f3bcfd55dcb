"""Record the images that a run was trained on, so that an evaluation can count test images seen in training.

An image's id is 8 bytes of a hash of its content. Each process writes its sorted ids to a file in
`<run>/training_pictures/` with every checkpoint; a million images take 8 MB. If a process is killed, images that it
saw after its last checkpoint are recorded only when the resumed run sees them again.
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
from koclip.models import open_clip

_FOLDER = "training_pictures"
_WAITING = 1_000_000  # ids collected before they are sorted

Ids = npt.NDArray[np.int64]


class TrainingPictures:
    """The images of one process's batches, in the directory of a run.

    `begins` is whether the run is at its first step. A resumed run without these files records nothing, because its
    earlier images are unknown.
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
        """Record a batch's images, if it has any."""
        if self._file is None or (batch.pixel_values is None and batch.image is None):
            return
        self._waiting.append(batch.pair_ids[:, 1].numpy().copy())  # not the whole pinned batch
        self._count += len(batch.pair_ids)
        if self._count > _WAITING:
            self._sort_in()

    def write(self) -> None:
        """Write the file, atomically."""
        if self._file is None:
            return
        self._sort_in()
        with storage.atomic(self._file) as partial, partial.open("wb") as opened:
            np.save(opened, self._known)

    def _sort_in(self) -> None:
        self._known = np.unique(np.concatenate([self._known, *self._waiting]))
        self._waiting, self._count = [], 0


def read_ids(run: Path) -> Ids | None:
    """Return the sorted ids of all images that a run was trained on; None if it has not recorded them."""
    files = sorted((run / _FOLDER).glob("*.npy"))
    return np.unique(np.concatenate([np.load(file) for file in files])) if files else None


def count(ids: Ids, digests: Sequence[bytes]) -> int:
    """Return how many images, given by their digests, are among the `ids` of `read_ids`."""
    return int(np.isin([image_id(digest) for digest in digests], ids).sum())


def of_model(model: str) -> tuple[Ids | None, list[str]]:
    """Return the ids of all images that a model was trained on, and the names of models whose images are unknown.

    This includes the models that it was built from (`model.clip`). The images of a model are known if it is a directory
    inside its run's directory.
    """
    known: list[Ids] = []
    unknown: list[str] = []
    base: str | None = model
    while base:
        run = Path(base).resolve().parent
        file = run / "config.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if Path(base).is_dir() and file.is_file() else {}
        ids = read_ids(run) if config else None
        if ids is None:  # a path is shortened: its first parts belong to this machine
            is_path = Path(base).exists() or base.startswith(open_clip.PREFIX)
            unknown.append("/".join(Path(base).parts[-2:]) if is_path else base)
        else:
            known.append(ids)
        section = config.get("model")  # in an evaluation's config, a name
        base = section.get("clip") if isinstance(section, dict) else None
    return np.unique(np.concatenate(known)) if known else None, unknown
