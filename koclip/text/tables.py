"""Read the tables of words in `koclip/assets`."""

from importlib import resources


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table; lines that are empty or begin with "# " are none."""
    text = resources.files("koclip").joinpath("assets", name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line and not line.startswith("# ")]
