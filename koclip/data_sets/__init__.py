"""Public data sets that koclip builds from their sources: `koclip data <name>`, recipes/data.py."""

from koclip import installation

installation.require("data")
from koclip.data_sets import cifar10, crossmodal_3600, emoji, flickr8k_ko, tiny_imagenet_ko, xtd10  # noqa: E402
from koclip.data_sets.data_set import DataSet, build  # noqa: E402

_SETS = (emoji, flickr8k_ko, tiny_imagenet_ko, cifar10, crossmodal_3600, xtd10)
DATA_SETS: dict[str, DataSet] = {module.DATA_SET.name: module.DATA_SET for module in _SETS}

__all__ = ["DATA_SETS", "DataSet", "build"]
