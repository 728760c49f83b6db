.PHONY: setup train smoke test test-asan cuda cuda-emulated test-cuda-emulator lint bench plot gpu wheels readme-table

VENV := .venv
PYTHON := $(VENV)/bin/python
WHEEL_PYTHON ?= 3.12
TEST_PROCESSES ?= 2
STAMP := $(VENV)/.installed
LIBRARY := dlvae_kernels/native_cpu.abi3.so
# The address and undefined-behaviour sanitizers; the first fault ends the program. Two warnings are off: parameters are
# unused on some instruction sets, and the compiler's own headers read uninitialised registers. The tiles of AMX, which few
# machines have, are emulated.
ASAN := -std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unused-parameter -Wno-maybe-uninitialized -DDLVAE_EMULATE_TILES -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN_OBJECTS := $(patsubst %.cpp,build/asan/%.o,$(wildcard csrc/tests/*.cpp csrc/cpu/isa/*.cpp) csrc/cpu/dispatch.cpp)

setup: $(LIBRARY)

# Installation runs again only when the requirements changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt "setuptools>=77"
	DLVAE_BUILD_EXT=0 $(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[viz,bench,dev]"
	touch $@

# The library is rebuilt when csrc changed, without a new installation.
$(LIBRARY): $(STAMP) setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

train: setup
	$(PYTHON) -m models.train $(ARGS)

# One quick check of each operation and layer.
smoke: setup
	$(PYTHON) -m pytest -m small $(ARGS)

# Threads that wait let the other processes run. A process that has run out of tests takes some from the other.
test: setup
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(TEST_PROCESSES) $(ARGS)

# Tests of the C++ kernels without torch, on every instruction set that this processor supports.
test-asan: build/asan/tests
	$<

build/asan/tests: $(ASAN_OBJECTS)
	$(CXX) $(ASAN) $^ -o $@

build/asan/%.o: %.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(ASAN) -MMD -MP -c $< -o $@

-include $(ASAN_OBJECTS:.o=.d)

# The CUDA kernels, for the architectures in DLVAE_CUDA_ARCHS or, if that is "all", for all supported ones. This needs nvcc,
# but no GPU. Register spills and warnings are errors; build/cuda/*/*.ptxas.txt lists the resources of each kernel.
DLVAE_CUDA_ARCHS ?= 80 90
CUDA_ARCHS := $(if $(filter all,$(DLVAE_CUDA_ARCHS)),80 86 89 90 100 120,$(DLVAE_CUDA_ARCHS))
NVCC ?= nvcc
TORCH = $(shell $(PYTHON) -c "import importlib.util as i; print(*i.find_spec('torch').submodule_search_locations)")
TORCH_FLAGS = -std=c++17 -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem $(TORCH)/include
TORCH_LIBRARIES = -L$(TORCH)/lib -ltorch -ltorch_cpu -lc10
space := $(subst ,, )
CUDA_BUILD := build/cuda/$(subst $(space),-,$(strip $(CUDA_ARCHS)))
CUDA_SOURCES := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp)
CUDA_OBJECTS := $(CUDA_SOURCES:csrc/cuda/%=$(CUDA_BUILD)/%.o)
# PTX of the newest architecture runs on future GPUs.
CUDA_NEWEST := $(lastword $(CUDA_ARCHS))
GENCODE := $(foreach arch,$(CUDA_ARCHS),-gencode arch=compute_$(arch),code=sm_$(arch)) \
	-gencode arch=compute_$(CUDA_NEWEST),code=compute_$(CUDA_NEWEST)
NVCC_FLAGS = -O3 $(TORCH_FLAGS) $(GENCODE) -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Werror \
	-Xptxas -v,--warn-on-spills,--warning-as-error

cuda: $(CUDA_BUILD)/native_cuda.abi3.so
	cp $< dlvae_kernels/native_cuda.abi3.so

# libtorch loads libtorch_cuda if there is one.
$(CUDA_BUILD)/native_cuda.abi3.so: $(CUDA_OBJECTS)
	$(NVCC) $(GENCODE) -shared $^ -o $@ -Xlinker --no-as-needed $(TORCH_LIBRARIES)

$(CUDA_BUILD)/%.o: csrc/cuda/% Makefile
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@ 2> $(@:.o=.ptxas.txt) || { cat $(@:.o=.ptxas.txt); exit 1; }

-include $(CUDA_OBJECTS:.o=.d)

# The same kernels compiled for the CPU, to test them without a GPU: csrc/tests/cuda/emulator.h.
EMULATED_BUILD := build/cuda-emulated$(if $(SANITIZE),-sanitized)
EMULATED_SOURCES := $(CUDA_SOURCES) $(wildcard csrc/tests/cuda/*.cpp)
EMULATED_OBJECTS := $(EMULATED_SOURCES:%=$(EMULATED_BUILD)/%.o)
# The library without the code for GPUs only, and without tests.
EMULATED_LIBRARY := $(filter-out %/device.cu.o %_test.cpp.o,$(EMULATED_OBJECTS))
EMULATED_TESTS := $(filter %_test.cpp.o %/block.cpp.o %/fiber.cpp.o,$(EMULATED_OBJECTS))
EMULATED_FLAGS = -O2 -g $(TORCH_FLAGS) -DDLVAE_EMULATE_CUDA -fPIC -fvisibility=hidden -ffp-contract=off \
	-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-unused-parameter $(if $(SANITIZE),-fsanitize=address -fno-omit-frame-pointer)

cuda-emulated: $(EMULATED_BUILD)/native_cuda_emulated.so

$(EMULATED_BUILD)/native_cuda_emulated.so: $(EMULATED_LIBRARY)
	$(CXX) $(EMULATED_FLAGS) -shared $^ -o $@ $(TORCH_LIBRARIES)

# Tests of the emulator itself.
test-cuda-emulator: $(EMULATED_BUILD)/tests
	$<

$(EMULATED_BUILD)/tests: $(EMULATED_TESTS)
	$(CXX) $(EMULATED_FLAGS) $^ -o $@

$(EMULATED_BUILD)/%.o: % Makefile
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -MMD -MP -x c++ -c $< -o $@

-include $(EMULATED_OBJECTS:.o=.d)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTHON) tools/check_language.py
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -type f)

bench: setup
	$(PYTHON) -m benchmarks standard

plot: setup
	$(PYTHON) -m benchmarks plot

readme-table: setup
	$(PYTHON) -m benchmarks readme-table

# Downloads baselines into .whl for a GPU machine without a network, where `make gpu` installs them.
wheels: setup
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEEL_PYTHON) --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --constraint constraints.txt --dest .whl \
		flash-kmeans eai-sparsify vector-quantize-pytorch einops einx loguru torch-einops-utils frozendict hypothesis sortedcontainers

# Needs a GPU and no installation; `python3 -m benchmarks gpu` does the same.
gpu:
	python3 -m benchmarks gpu $(ARGS)
