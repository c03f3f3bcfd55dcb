"""Embed images and texts with any dual encoder. `load` opens a model; `Encoder` is what every model offers."""

from koclip.encoders.base import Encoder, NoPatchesError
from koclip.encoders.specs import load

__all__ = ["Encoder", "NoPatchesError", "load"]
