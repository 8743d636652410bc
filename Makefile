# A fresh clone and Python 3.11 are enough: every target sets up .venv by itself, once.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
BIN := .venv/bin
# Most tests use one core; a process for each core, as far as memory is sure to last.
SPREAD := --numprocesses auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format types layers check hooks wheels docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## distil a guide in minutes, compare it, write a report
	$(BIN)/pilotfish demo

test: .venv/.dev ## run every test
	$(BIN)/pytest $(SPREAD)

test-fast: .venv/.dev ## run the tests that are not slow
	$(BIN)/pytest $(SPREAD) -m "not slow"

lint: .venv/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.dev ## mypy: strict
	$(BIN)/mypy

layers: .venv/.dev ## import-linter: imports run downward only
	$(BIN)/lint-imports

check: lint types layers test ## lint, types, layers and test

hooks: .venv/.dev ## run lint, types and layers before every commit
	$(BIN)/pre-commit install

wheels: .venv/.dev ## build both packages into dist/, as wheels and sources
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist assets

docs: .venv/.docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove what make made
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# One stamp for each set of extras: a second run does nothing.
.venv/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/.installed: pyproject.toml assets/pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[training,evaluation]' -e ./assets
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.installed
	$(PIP) -e '.[docs]'
	@touch $@
