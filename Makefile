# Each target makes the virtual environment and installs what it needs by itself.
#   make demo | test | test-all | lint | audit | docs | bench | venv | dist | clean   variables: PYTHON, VENV, ARGS, PINS

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# What the installation has to satisfy beside pyproject.toml, to test with other versions than the newest:
#   make test PINS="torch==2.11.* triton==3.6.* numpy<2.4"
PINS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
OPTIONAL_STAMP := $(VENV)/.installed-optional
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(foreach pin,$(PINS),'$(pin)')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint audit docs bench venv dist clean FORCE

help:
	@echo "make demo    fine-tune a small model with several methods, side by side (three minutes on two cores)"
	@echo "make test    run the tests"
	@echo "make test-all  install the optional packages and run the tests that are skipped without them"
	@echo "make lint    ruff and mypy"
	@echo "make audit   look up known vulnerabilities of the installed packages"
	@echo "make docs    build the site of docs/ into site/"
	@echo "make bench   run the benchmarks"
	@echo "make venv    only the virtual environment, with what the other targets need"
	@echo "make dist    build the source distribution and the wheel into dist/, and check them"
	@echo "make clean   remove caches, build products and the demo's output (not $(VENV), not other runs)"

# The stamp is as new as the last installation of what pyproject.toml asked for then, and holds the PINS of it.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[dev]"
	echo '$(PINS)' > $(STAMP)

ifneq ($(strip $(PINS)),$(strip $(shell cat $(STAMP) 2>/dev/null)))
$(STAMP): FORCE
endif

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/genft demo $(ARGS)

# One thread per worker: more would fight over the cores. An idle worker takes over tests that wait behind a long one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Some wheels have no build for every Python: what does not install fails here. DeepSpeed builds its parts when they run.
$(OPTIONAL_STAMP): $(STAMP)
	DS_BUILD_OPS=0 $(INSTALL) -e ".[dev,optional]"
	touch $(OPTIONAL_STAMP)

# The files with tests that ask for a package, and the kernels at every rank. -ra lists what is skipped all the same.
test-all: $(OPTIONAL_STAMP)
	OMP_NUM_THREADS=1 GENFT_ALL_RANKS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/kernels/test_cross_compile.py $(shell grep -rlF pytest.importorskip tests) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Of the versions that are installed; the project itself is left out.
audit: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10"
	$(BIN)/python -m pip_audit --skip-editable $(ARGS)

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) -e ".[docs]"
	touch $(DOCS_STAMP)

# A warning, such as a link that leads nowhere, is an error.
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -o addopts="-ra --strict-markers" --benchmark-only $(ARGS)

# Needs none of the project's own requirements.
dist:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "build>=1.2" "twine>=6.1"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf runs/demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
