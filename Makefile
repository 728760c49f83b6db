.PHONY: setup train test test-asan lint bench plot gpu wheels readme-table

VENV := .venv
PYTHON := $(VENV)/bin/python
WHEEL_PYTHON ?= 3.12
STAMP := $(VENV)/.installed
LIBRARY := dlvae_kernels/native_cpu.abi3.so
# Address and bounds of every access, and what C++ leaves undefined; the first fault ends the program. The warnings that are
# off see parameters for other instruction sets, and registers that the compiler's own headers leave without a value.
# Few machines have the tiles of AMX: here they are arrays.
ASAN := -std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unused-parameter -Wno-maybe-uninitialized -DDLVAE_EMULATE_TILES -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN_OBJECTS := $(patsubst %.cpp,build/asan/%.o,$(wildcard csrc/tests/*.cpp csrc/cpu/isa/*.cpp) csrc/cpu/dispatch.cpp)

setup: $(LIBRARY)

# Again only when what is to be installed changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt "setuptools>=77"
	DLVAE_BUILD_EXT=0 $(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[viz,bench,dev]"
	touch $@

# And the library again when csrc changed, which takes no installation.
$(LIBRARY): $(STAMP) setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

train: setup
	$(PYTHON) -m models.train $(ARGS)

test: setup
	$(PYTHON) -m pytest $(ARGS)

# The C++ kernels without torch, on every instruction set that this processor has.
test-asan: build/asan/tests
	$<

build/asan/tests: $(ASAN_OBJECTS)
	$(CXX) $(ASAN) $^ -o $@

build/asan/%.o: %.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(ASAN) -MMD -c $< -o $@

-include $(ASAN_OBJECTS:.o=.d)

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
