# Every target sets up its own virtual environment first, once, and again when the dependencies
# change: `make demo` is the first command that a fresh clone needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the checks of one machine may use; the tests' own threads come on top.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.ready  ## train with a compiled and a dense loss: same batch, same memory (about 2 minutes)
	$(BIN)/cl-compiler demo

test: $(VENV)/.ready  ## the tests that need minutes at most and no GPU
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not full and not gpu"

test-full: $(VENV)/.ready  ## every test that needs no GPU
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not gpu"

lint: $(VENV)/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## let ruff sort the imports and lay out the lines
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## measure side by side with dense losses
	$(BIN)/cl-compiler bench

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last: an interrupted installation is started again.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
