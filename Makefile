# Every target sets itself up: a virtual environment in .venv, then the work. Needs Python >= 3.11, git and make.
# TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu takes the CPU build of torch where the default is a CUDA build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-slow lint docs bench clean setup

quickstart: $(STAMP)                ## the whole story on a tiny model; writes quickstart/report.html
	$(BIN)/trimtab quickstart --out quickstart

test: $(STAMP) lint docs            ## everything CI checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: $(STAMP)                 ## real models and long runs
	$(BIN)/python -m pytest -m slow -n 0 --timeout 3600

lint: $(STAMP)                      ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)                      ## build the documentation strictly, into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)                     ## speed, as ratios against the named peers
	$(BIN)/python benchmarks/optimizer_step.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .hypothesis
