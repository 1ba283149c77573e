# Each target makes the virtual environment and installs what it needs by itself.
#   make demo | test | lint | docs | bench | clean        variables: PYTHON, VENV, ARGS

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:
	@echo "make demo    fine-tune a small model with every method, side by side (some five minutes on two cores)"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the site of docs/ into site/"
	@echo "make bench   run the benchmarks"
	@echo "make clean   remove caches, build products and the demo's output (not $(VENV), not other runs)"

# The stamp is as new as the last installation of what pyproject.toml asked for then.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/genft finetune $(ARGS)

# One thread per worker: more would fight over the cores. An idle worker takes over tests that wait behind a long one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $(DOCS_STAMP)

# A warning, such as a link that leads nowhere, is an error.
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -o addopts="-ra --strict-markers" --benchmark-only $(ARGS)

clean:
	rm -rf runs/demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
