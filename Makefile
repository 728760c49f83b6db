.PHONY: setup train test lint bench plot gpu wheels readme-table

VENV := .venv
PYTHON := $(VENV)/bin/python
WHEEL_PYTHON ?= 3.12
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

plot: setup
	$(PYTHON) -m benchmarks plot

readme-table: setup
	$(PYTHON) -m benchmarks readme-table

# Baselines for a GPU machine without a network: `make gpu` there installs what lies in .whl.
wheels: setup
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEEL_PYTHON) --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --constraint constraints.txt --dest .whl \
		flash-kmeans eai-sparsify vector-quantize-pytorch einops einx loguru torch-einops-utils frozendict hypothesis sortedcontainers

# On a machine with a GPU; needs no installation: python3 -m benchmarks gpu does the same.
gpu:
	python3 -m benchmarks gpu
