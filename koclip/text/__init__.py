"""Strings in, strings or token ids out."""

from importlib import resources


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table in `koclip/assets`, without empty lines and lines that begin with "# "."""
    text = resources.files("koclip").joinpath("assets", name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line and not line.startswith("# ")]
