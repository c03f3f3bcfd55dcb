"""Search a collection of images by their embeddings: built once, memory-mapped, exact or approximate."""

from koclip.search.index import ImageIndex, SearchResult, open_index

__all__ = ["ImageIndex", "SearchResult", "open_index"]
