"""A model and a data set in, numbers and pictures out."""

from koclip import installation

installation.require("eval")
