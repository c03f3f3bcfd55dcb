"""The packages of the wheel; all else is in pyproject.toml, which cannot both search for packages and add some."""

from setuptools import find_packages, setup

# Folders beside koclip/ that are inside it once it is installed.
BESIDE = {"koclip.recipes": "recipes", "koclip.data_cards": "data_cards", "koclip.space": "space"}

setup(packages=[*find_packages(include=["koclip", "koclip.*"]), *BESIDE], package_dir=BESIDE)
