"""What a training run will take, computed before it starts: parameters, FLOPs, memory, disk, time and price."""

from koclip import installation

installation.require("train")
