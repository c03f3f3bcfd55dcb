"""The checkpoints of a run: written in the background, whole or not at all; the newest intact one is found."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from tqdm.auto import tqdm

from koclip import storage
from koclip.config import RunError


class Series:
    """`step-<step>/` directories in one folder. What is being written, deleted or known to be damaged has other names.

    Only one process may write; the others may look.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def begin(self, step: int) -> Path:
        """Return an empty directory to write a checkpoint into, once the one before is on disk."""
        self.wait()
        partial = self.folder / f"writing-step-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, write: Callable[[Path], None], keep: int) -> None:
        """In the background, let `write` fill `partial`, make it a checkpoint and delete all but the newest `keep`."""
        self._pending = self._thread.submit(self._finish, partial, write, keep)

    def wait(self) -> None:
        """Wait until what was begun is on disk.

        Raises:
            RunError: it could not be written. The checkpoints before it are as they were.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def stop_if_failed(self) -> None:
        """Raise what `wait` would, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint that is as it was written, None if there never was one.

        Damaged ones on the way are named in the log and moved aside; what an earlier process left half done goes.

        Raises:
            RunError: there are checkpoints, and all of them are damaged.
        """
        for rest in [*self.folder.glob("writing-*"), *self.folder.glob("deleting-*")]:
            shutil.rmtree(rest)
        for checkpoint in sorted(self.folder.glob("step-*"), reverse=True):
            reason = storage.damage(checkpoint)
            if reason is None:
                return checkpoint
            aside = self._move(checkpoint, "damaged")
            tqdm.write(f"Checkpoint {checkpoint.name} is damaged and not used: {reason}. It is now {aside.name}.")
        damaged = sorted(one.name for one in self.folder.glob("damaged-*"))
        if damaged:
            raise RunError(
                f"resume: no checkpoint in {self.folder} is intact ({', '.join(damaged)}); begin anew with another "
                "output_dir, or mend one and give it its name step-<step> back"
            )
        return None

    def _finish(self, partial: Path, write: Callable[[Path], None], keep: int) -> None:
        final = self.folder / partial.name.removeprefix("writing-")
        try:
            write(partial)
            storage.seal(partial)
            storage.put(partial, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{final} could not be written: {error}. The checkpoints before it are intact; make room or choose "
                "another disk, then go on with --resume auto"
            ) from error
        for old in sorted(self.folder.glob("step-*"))[:-keep]:
            shutil.rmtree(self._move(old, "deleting"))

    def _move(self, checkpoint: Path, prefix: str) -> Path:
        """Rename a checkpoint, so that it cannot be taken for one, even if the process dies now."""
        target = checkpoint.with_name(f"{prefix}-{checkpoint.name}")
        shutil.rmtree(target, ignore_errors=True)
        return checkpoint.rename(target)
