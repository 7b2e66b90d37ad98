PYTHON ?= python3
EXTRAS ?=
RUN ?=
JOBS ?= 3

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help sweep report example test lint types format clean

help: ## list every target
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.12 makes .venv with another interpreter; EXTRAS=flashinfer,gpu adds optional parts to make sweep;"
	@echo "RUN=DIR is the run that make report prints (default: the newest); JOBS=N: make test runs N files of tests beside each other."

sweep: .venv/.sweep-$(EXTRAS) ## run the plan `quick` here; it ends by saying where its report is
	@$(BIN)/moebench sweep --plan quick

report: .venv/.sweep-$(EXTRAS) ## print the report of a run
	@$(BIN)/moebench report $(RUN)

example: .venv/.sweep-$(EXTRAS) ## docs/example and README's example from a run: make example RUN=runs/ID
	@$(BIN)/python docs/make_example.py $(or $(RUN),docs/example)

test: .venv/.test lint types ## lint, types, and every test that needs no GPU, with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/.test ## ruff: rules and format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test ## mypy --strict over the package
	$(BIN)/mypy

format: .venv/.test ## let ruff put right what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, builds and caches; runs stay
	rm -rf .venv build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that what pyproject.toml and constraints.txt ask for is installed, so a second call starts at once.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moebench needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.sweep-$(EXTRAS): .venv/.python pyproject.toml constraints.txt
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

.venv/.test: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e '.[test]'
	@touch $@
