"""From a trained model to a Hub repository: pre-flight, card, push. Nothing else writes to the Hub."""

from koclip import installation

installation.require("publish")
