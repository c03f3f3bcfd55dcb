"""From a trained model or a curated set to a Hub repository: pre-flight, card, push. Nothing else writes there."""

from koclip import installation

installation.require("publish")
