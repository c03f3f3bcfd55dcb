"""Search a collection of images by their embeddings: built once, memory-mapped, exact or approximate."""

from koclip.search.index import Found, ImageIndex, open_index

__all__ = ["Found", "ImageIndex", "open_index"]
