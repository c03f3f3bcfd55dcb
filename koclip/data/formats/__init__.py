"""One file for each format that pairs are read from."""
