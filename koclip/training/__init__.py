"""The training loop, what comes right before it, and what keeps it exact and healthy."""

from koclip.training.health import DivergedError, Event
from koclip.training.loop import StopRequest, TrainState, progress_text, steps
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
