"""Embeddings on disk: computed once, memory-mapped, used by alignment, evaluation and search."""
