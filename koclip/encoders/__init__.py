"""Embed images and texts with anybody's dual encoder."""
