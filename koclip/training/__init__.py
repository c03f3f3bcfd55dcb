"""The training loop, what comes right before it, and what keeps it exact and healthy."""

from koclip import installation

installation.require("train")
from koclip.training.loop import DivergedError, Event, StopRequest, TrainState, progress_text, steps  # noqa: E402
from koclip.training.setup import prepare, release, start  # noqa: E402

__all__ = [
    "DivergedError",
    "Event",
    "StopRequest",
    "TrainState",
    "prepare",
    "progress_text",
    "release",
    "start",
    "steps",
]
