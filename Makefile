# Everything from a fresh clone: `make demo`, `make test`. Needs Python >= 3.11; a C++ compiler makes the CPU path faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.retinar-installed
NATIVE := $(wildcard kernels/native/* kernels/*/cpu.cpp)
DEVICE ?= cuda
DATA ?=
OUT ?= runs/model

.PHONY: setup demo test slow lint format typecheck bench gpu model clean

setup: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "retinar needs Python 3.11 or newer, found %d.%d: run make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[metrics,dev]"
	@touch $@

demo: setup
	$(BIN)/retinar demo

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow" --require-native --benchmark-disable

slow: setup
	$(BIN)/python -m pytest -m slow --require-native

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

bench: setup
	$(BIN)/retinar bench

# Correctness in bf16, then benchmarks, one JSON. From a bare checkout: torch, triton, numpy and pytest alone.
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m retinar.bench.gpu --device $(DEVICE)

# The small released model, in stages that each resume. From a bare checkout: torch, numpy, pillow, safetensors, lpips.
model:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m retinar.train.released --data "$(DATA)" --out "$(OUT)" $(MODEL_FLAGS)

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache $(VENV)
