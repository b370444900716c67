# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer, and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow coverage check bench clean

demo: .venv/demo-is-ready  ## the three stages on real clips with a tiny random model, on the CPU, into runs/demo
	$(BIN)/python -m tests.demo

test: .venv/dev-is-ready  ## the tests that a commit must pass
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/dev-is-ready  ## many processes, kills, minutes
	$(BIN)/python -m pytest -m slow

coverage: .venv/dev-is-ready  ## lines that no test reaches, of both suites together; not of processes that are killed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine
	$(BIN)/coverage report --skip-covered --show-missing

check: .venv/dev-is-ready  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/dev-is-ready  ## the measured numbers, each beside its limit
	$(BIN)/python -m benchmarks

clean:  ## what was built here; caches and runs made elsewhere stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo-is-ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'LatentReel needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Name another: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes, once)"
	$(INSTALL) ".[demo]"
	rm -rf build latentreel.egg-info
	touch $@

.venv/dev-is-ready: .venv/demo-is-ready
	$(INSTALL) ".[demo,dev]"
	rm -rf build latentreel.egg-info
	touch $@
