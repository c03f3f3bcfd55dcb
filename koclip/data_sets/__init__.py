"""Public data sets that koclip builds from their sources: `koclip data <name>`, recipes/data.py."""

from koclip.data_sets import emoji
from koclip.data_sets.data_set import DataSet, build

DATA_SETS: dict[str, DataSet] = {data_set.name: data_set for data_set in (emoji.DATA_SET,)}

__all__ = ["DATA_SETS", "DataSet", "build"]
