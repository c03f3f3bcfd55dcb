"""A model and a data set in, numbers and pictures out."""
