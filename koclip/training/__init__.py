"""The training loop and what comes right before it."""

from koclip.training.loop import Trainer, steps
from koclip.training.setup import prepare, start
from koclip.training.signals import StopRequest

__all__ = ["StopRequest", "Trainer", "prepare", "start", "steps"]
