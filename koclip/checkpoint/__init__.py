"""The run directory: configuration, metrics, skipped samples, checkpoints to resume from, the published model."""

from koclip.checkpoint.model import publish
from koclip.checkpoint.run import Run, SkippedError

__all__ = ["Run", "SkippedError", "publish"]
