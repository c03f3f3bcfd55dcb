"""Embeddings on disk: computed once, memory-mapped, and used for alignment, evaluation and search."""
