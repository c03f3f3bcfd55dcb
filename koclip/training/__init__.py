"""The training loop, what comes right before it, and what keeps it exact and healthy."""

from koclip.training.loop import DivergedError, Event, StopRequest, TrainState, progress_text, steps
from koclip.training.setup import prepare, release, start

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
