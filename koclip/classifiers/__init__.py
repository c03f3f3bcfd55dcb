"""From embeddings to decisions: a few labelled pictures, calibration, and thresholds for "none of these"."""
