"""Methods that give a CLIP another text encoder or adapt its text encoder."""

from koclip import installation

installation.require("train")
