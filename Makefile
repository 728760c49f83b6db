.PHONY: setup train test lint bench gpu readme-table

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

setup: $(STAMP)

# Again only when what is to be installed changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt "setuptools>=77"
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[viz,bench,dev]"
	touch $@

train: setup
	$(PYTHON) -m models.train $(ARGS)

test: setup
	$(PYTHON) -m pytest $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup
	$(PYTHON) -m benchmarks cpu

readme-table: setup
	$(PYTHON) -m benchmarks readme-table

# On a machine with a GPU; needs no installation: python3 -m benchmarks gpu does the same.
gpu:
	python3 -m benchmarks gpu
