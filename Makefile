# Everything from a fresh clone: `make demo`, `make test`. Needs Python >= 3.11; a C++ compiler makes the CPU path faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.retinar-installed
NATIVE := $(wildcard kernels/native/* kernels/*/*.cpp kernels/*/*.h)
DEVICE ?= cuda
DATA ?=
OUT ?= runs/model
SANITIZED := build/sanitize

.PHONY: setup demo test slow sanitize lint format typecheck docs bench gpu model clean

setup: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "retinar needs Python 3.11 or newer, found %d.%d: run make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[metrics,dev]"
	@touch $@

demo: setup
	$(BIN)/retinar demo

# Twice: Triton's compiler and its interpreter cannot share a process. tests/conftest.py says what runs in which.
test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow" --require-native --benchmark-disable
	@case "$$(uname -sm)" in \
	"Linux x86_64" | "Linux aarch64") set -x; TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" --benchmark-disable;; \
	*) echo "GPU kernels were neither compiled nor run: there is no Triton for this system";; esac

slow: setup
	$(BIN)/python -m pytest -m slow --require-native

# The native tests on a module that stops at bad addresses and undefined behaviour (GCC on Linux). Its runtimes must be in
# the process before Python, and fresh memory holds NaN. TESTS="-k portable" and the like run fewer.
sanitize: setup
	$(BIN)/python -m pip install --quiet "nanobind>=2.4" "cmake>=3.24"
	$(BIN)/cmake -S . -B $(SANITIZED) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRETINAR_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build $(SANITIZED) --parallel 2
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" UBSAN_OPTIONS=print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824 \
	$(BIN)/python tests/sanitize.py $(SANITIZED)/_native.*.so -p no:cacheprovider $(wildcard tests/kernels/test_native*.py) $(TESTS)

lint: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot see that retinar.kernels is the folder kernels: show it the tree that an installed wheel has.
typecheck: setup
	@rm -rf build/typing && mkdir -p build/typing/retinar
	@ln -s $(CURDIR)/retinar/* $(CURDIR)/kernels $(CURDIR)/engine $(CURDIR)/train $(CURDIR)/bench build/typing/retinar/
	cd build/typing && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p retinar

# Generated pages: docs/kernels.md, from the kernels' machine code and the ops' specs. Needs no GPU.
docs: setup
	$(BIN)/python -m retinar.bench.kernel_table

# BENCH_FLAGS="--only decoding --llama-cpp ../llama.cpp" and the like.
bench: setup
	$(BIN)/retinar bench $(BENCH_FLAGS)

# Correctness, then benchmarks, then a training step's profile: one JSON, within 8.5 minutes. From a bare checkout with
# torch, triton and numpy alone. DEVICE=cpu exercises all of it at tiny sizes, in Triton's interpreter.
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m retinar.bench.gpu --device $(DEVICE) $(GPU_FLAGS)

# The small released model, in stages that each resume. From a bare checkout: torch, numpy, pillow, safetensors, lpips.
model:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m retinar.train.released --data "$(DATA)" --out "$(OUT)" $(MODEL_FLAGS)

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache $(VENV)
