"""Prepare a model for training, train it step by step, and check every step."""

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
