"""Results and configurations in, a model that strangers use out."""
