"""Parameters: building, wrapping, loading and embedding with dual encoders."""
