# One command each: make demo, make test, make lint, make fix, make bench.
PYTHON ?= python3
VENV := .venv
BASE_VENV := .venv-base
BIN := $(VENV)/bin
DEMO_VENV := .venv-demo

.PHONY: help demo test lint fix bench clean

help:
	@echo "make demo    start an embedded server and watch values go through it"
	@echo "make test    run every test"
	@echo "make lint    check format, types and import directions"
	@echo "make fix     apply what the formatter and the linter can fix"
	@echo "make bench   measure: the client, durable sets, imports, the decorator, stampedes, faults"

$(DEMO_VENV)/.installed: pyproject.toml
	@echo "Installing aiokv into $(DEMO_VENV) ..."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed: pyproject.toml
	@echo "Installing the development environment into $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# What a user without any extra has; a test imports and uses the package there.
$(BASE_VENV)/.installed: pyproject.toml
	@echo "Installing the base package alone into $(BASE_VENV) ..."
	@$(PYTHON) -m venv $(BASE_VENV)
	@$(BASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

demo: $(DEMO_VENV)/.installed
	@$(DEMO_VENV)/bin/python examples/demo.py

test: $(VENV)/.installed $(BASE_VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.bench: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/client_overhead.py
	$(BIN)/python benchmarks/sqlite_sets.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/decorator.py
	$(BIN)/python benchmarks/outage.py
	$(BIN)/python benchmarks/stampede.py --plot stampede.png
	$(BIN)/python benchmarks/faults.py --plot faults.png

clean:
	rm -rf $(VENV) $(BASE_VENV) $(DEMO_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
