"""The run directory: configuration, metrics, skipped samples, checkpoints to resume from, the saved model."""

from koclip import installation

installation.require("train")
