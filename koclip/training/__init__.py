"""Prepare a model for training, train it step by step, and check every step."""

from koclip import installation

installation.require("train")
from koclip.training.loop import DivergedError, Event, TrainState, steps, stop_requests  # noqa: E402
from koclip.training.setup import prepare, release, start  # noqa: E402

__all__ = ["DivergedError", "Event", "TrainState", "prepare", "release", "start", "steps", "stop_requests"]
