# Two commands do everything: `make quickstart` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain `torch` may pull gigabytes of CUDA packages: `make quickstart TORCH=torch` asks for those.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format starter benchmark docs clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,dev]'
	touch $@

quickstart: $(VENV)/.installed  ## Install, fetch, teach starter Chinese and a domain, report in runs/quickstart/
	$(BIN)/trimtab quickstart --out runs/quickstart

# Whole files stay with one worker, so that each builds its tiny models once. One thread each: models are tiny.
test: $(VENV)/.installed lint  ## Lint, check types, run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed  ## Lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

starter: $(VENV)/.installed  ## Align starter's image tower anew (about half an hour)
	$(BIN)/trimtab align-starter

benchmark: $(VENV)/.installed  ## Measure the language link beside sentence-transformers
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/language.py

docs: $(VENV)/.installed  ## Build the docs site into site/
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:  ## Remove environment and runs; fetched packages and caches stay in the cache folder
	rm -rf $(VENV) runs site
