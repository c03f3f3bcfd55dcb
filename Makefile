.DEFAULT_GOAL := help
.PHONY: help quickstart test check
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

quickstart: $(VENV)/.installed  ## Install into .venv and train a small Korean-English CLIP on the built-in data
	$(VENV)/bin/accelerate launch recipes/pretrain.py --output_dir runs/quickstart --resume auto

test: $(VENV)/.installed-dev  ## Install what tests need and run them (pass more with ARGS="-m slow")
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.installed-dev  ## Lint, format and type-check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@
