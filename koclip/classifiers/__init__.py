"""From embeddings to decisions: classifiers from a few labelled pictures, calibration, and thresholds for "none of these"."""
