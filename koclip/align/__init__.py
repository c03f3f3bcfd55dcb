"""Ways to give a CLIP another text encoder, or to adapt its own."""

from koclip import installation

installation.require("train")
