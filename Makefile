# Everything a fresh machine needs: `make demo` and `make test` set up .venv on their first run. `make help` lists all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cc csrc/*.h)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install demo test test-gpu lint bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml setup.py constraints.txt requirements-data.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch setuptools wheel pybind11
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[finetune,dev]'
	$(PIP) install --no-deps --requirement requirements-data.txt
	touch $@

install: $(STAMP)  ## virtual environment, pinned dependencies, native module; does nothing when nothing changed

demo: install  ## fine-tune a real model over a slow link, without and with overlap
	$(BIN)/parablock demo $(ARGS)

test: install lint  ## everything CI checks
	$(BIN)/python -m pytest $(ARGS)

test-gpu: install  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## all benchmarks; results in bench/results/
	$(BIN)/python -m bench.codec --json bench/results/codec.json
	$(BIN)/python -m bench.transport --json bench/results/transport.json
	$(BIN)/python -m bench.overlap --json bench/results/overlap.json
	$(BIN)/python -m bench.kernels --json bench/results/kernels.json

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info parablock_rt/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
