"""Strings in, strings or token ids out."""
