# Targets for working on probattn; `make` alone lists them.
# The environment in $(VENV) is made on first use and brought up to date when pyproject.toml changes.

VENV ?= .venv
# The interpreter that makes $(VENV); empty: the first that is new enough.
PYTHON ?=
# Where `make demo` writes its runs and figures.
OUT ?= demo
# Further arguments for pytest or the benchmark runner, such as ARGS='-k margin'.
ARGS ?=

BIN = $(VENV)/bin
# setuptools warns of folders of an editable installation, at length.
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --quiet
# One hash seed: programs that depend on the order of a set are then found in the compilation cache.
# Files in their own order: those that take longest, tests/end_to_end and tests/examples, then
# begin first.
PYTEST = PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# Scripts carry few types: what is checked are names, and the calls of the package.
UNTYPED = arg-type assignment call-overload index misc operator return-value type-var union-attr \
	var-annotated
SCRIPTS = --no-error-summary --no-warn-unused-ignores --allow-untyped-defs \
	--allow-incomplete-defs \
	$(addprefix --disable-error-code=,$(UNTYPED))

.SILENT:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all nightly lint format docs bench clean

help:  ## list the targets
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s  %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed  ## make .venv with probattn (editable) and the test tools

demo: install  ## fit, evaluate and draw the small example into OUT=demo (about 2 minutes)
	$(BIN)/probattn demo --out "$(OUT)"

# Most of the time goes into compiling, and half of that into XLA's optimisations.
test: install  ## run the tests on two processes, without the slow ones (about 7 minutes)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -m "not slow" $(ARGS)

test-slow: install  ## run the slow tests, which `make test` leaves out (about half an hour)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -m "slow and not nightly" $(ARGS)

test-all: install  ## run all tests in one go, with all optimisations of XLA
	$(PYTEST) $(ARGS)

nightly: $(VENV)/.installed-bench  ## more values, hostile input and kills in large numbers (hours)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -m nightly
	PROBATTN_HYPOTHESIS=nightly $(PYTEST) tests/probattn tests/models
	$(BIN)/python -m tests.robustness.fuzz --inputs 100000
	$(BIN)/python -m tests.robustness.kill --kills 200

lint: install  ## ruff and mypy, changing nothing
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy -p probattn
	for folder in benchmarks examples; do $(BIN)/mypy $(SCRIPTS) $$folder || exit 1; done

format: install  ## let ruff repair what it can
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

docs: $(VENV)/.installed-docs  ## build the site into build/docs, notebooks executed (about 3 minutes)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs $(ARGS)
	$(BIN)/python docs/_extensions/check_site.py build/docs
	echo "the site is build/docs/index.html"

bench: $(VENV)/.installed-bench  ## run the benchmarks
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## remove build products and caches; .venv and runs stay
	rm -rf build dist probattn.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)" -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	echo "installing probattn and its test tools into $(VENV) (about a minute the first time)"
	$(PIP) install --editable '.[test]'
	touch $@

$(VENV)/.installed-bench: pyproject.toml | $(VENV)/.installed
	$(PIP) install --editable '.[bench]'
	touch $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/.installed
	$(PIP) install --editable '.[docs]'
	touch $@

# Tried in turn: python3.12 (of .python-version), python3, newer ones by name, and pyenv's, whose
# commands on PATH refuse to start a version that is installed but not selected.
$(BIN)/python:
	wanted=$$(cat .python-version); \
	set -- "python$$wanted" python3 python3.13 python3.14; \
	if command -v pyenv >/dev/null; then \
		for version in "$$wanted" 3.13 3.14; do \
			prefix=$$(pyenv prefix "$$version" 2>/dev/null) && set -- "$$@" "$$prefix/bin/python"; \
		done; \
	fi; \
	if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; fi; \
	for python in "$$@"; do \
		if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' \
			>/dev/null 2>&1; then \
			exec "$$python" -m venv "$(VENV)"; \
		fi; \
	done; \
	echo "make: no Python >= $$wanted with venv among: $$*; install one or name it: make install PYTHON=/path/to/python3" >&2; \
	exit 1
