"""Search a collection of images by their embeddings: built once, memory-mapped, exact or approximate."""

from koclip import installation

installation.require("search")
from koclip.search.index import Found, ImageIndex, open_index  # noqa: E402

__all__ = ["Found", "ImageIndex", "open_index"]
