.DEFAULT_GOAL := help
.PHONY: help quickstart test check docs slow lowest
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
# Every library of `dependencies` and of the extra `all` does its work in one of these.
LOWEST_TESTS := $(addprefix tests/test_,adapters.py evaluate.py models.py onnx.py peers.py publish.py recipes.py search.py)
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
# Neighbours stay in one process, which then makes what a file's tests share only once.
PYTEST := -m pytest -n 2 --dist worksteal

help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

quickstart: $(VENV)/.installed  ## Install into .venv and train a small Korean-English CLIP on the built-in data
	$(VENV)/bin/koclip pretrain --output_dir runs/quickstart --resume auto

test: $(VENV)/.installed-dev  ## Install what tests need and run them (pass more with ARGS="-m slow")
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) --durations=20 $(ARGS)

# `make docs` runs the notebook.
slow: $(VENV)/.installed-dev  ## Run the tests that take minutes, and those of the Hub where it can be reached (at most one hour with `lowest`)
	OMP_NUM_THREADS=1 timeout --kill-after=30 37m $(VENV)/bin/python $(PYTEST) --ignore tests/test_notebook.py --durations=20 -m slow
	OMP_NUM_THREADS=1 timeout --kill-after=30 5m $(VENV)/bin/python -m pytest -m hub
	timeout --kill-after=30 18m $(MAKE) lowest

# torch and torchvision stay at the tested pair: other pairs may not match (constraints.txt).
lowest: $(LOWEST)/.installed  ## Run tests with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST) $(LOWEST_TESTS)

check: $(VENV)/.installed-dev  ## Lint, format and type-check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini

docs: $(VENV)/.installed-docs  ## Build the documents into site/; run the notebook and the Python of the README
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'slow or not slow' tests/test_docs.py tests/test_notebook.py

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) --editable '.[docs]'
	touch $@

$(LOWEST)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints.txt uv torch torchvision
	grep -E '^torch(vision)?==' constraints.txt > $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --upgrade --constraint $(LOWEST)/torch.txt --editable '.[dev]'
	touch $@
