# One command each: make demo, make test, make packages, make lint, make fix, make docs, make bench.
PYTHON ?= python3
VENV := .venv
BASE_VENV := .venv-base
BIN := $(VENV)/bin
DEMO_VENV := .venv-demo
# Under these versions the cache and the store are tested with eager tasks, too; `EAGER_ARGS=` takes the slow tests in.
EAGER_VERSIONS := 3.12 3.13
PACKAGE_VERSIONS := 3.12 3.13 3.14
EAGER_ARGS ?= -m "not slow"
# A file's tests stay together, since they share what is slow to start.
PYTEST_ARGS ?= --numprocesses=auto --dist=loadfile
# A name of pyenv's on the PATH need not lead to an interpreter.
python_of = $(shell for python in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python; do \
	"$$python" -c 'import ensurepip, sqlite3, ssl' 2>/dev/null && { echo "$$python"; break; }; done)
# The default interpreter's own environment, one for this version alone, or none where there is no such interpreter.
eager_venv = $(strip $(if $(filter $(1),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')),$(VENV),\
	$(if $(call python_of,$(1)),.venv-$(1))))

.PHONY: help demo test test-eager packages lint fix docs bench clean

help:
	@echo "make demo    start an embedded server and watch values go through it"
	@echo "make test    run every test, and those of the cache and the store with eager tasks on Python $(EAGER_VERSIONS)"
	@echo "make packages  build the wheel and the sdist, and install and use them in fresh environments, with each extra alone"
	@echo "make lint    check format, types and import directions"
	@echo "make fix     apply what the formatter and the linter can fix"
	@echo "make docs    draw the pictures and build the site in site/; any broken link is an error"
	@echo "make bench   measure all, keep the figures in benchmarks/results, and renew docs/benchmarks.md from them"

$(DEMO_VENV)/.installed: pyproject.toml
	@echo "Installing aiokv into $(DEMO_VENV) ..."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[server,speed]'
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

$(EAGER_VERSIONS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml
	@echo "Installing what the tests of the cache and the store need into .venv-$* ..."
	@"$(call python_of,$*)" -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(DEMO_VENV)/.installed
	@$(DEMO_VENV)/bin/python examples/demo.py

test: $(VENV)/.installed $(BASE_VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-eager

test-eager: $(EAGER_VERSIONS:%=test-eager-%)

.SECONDEXPANSION:
$(EAGER_VERSIONS:%=test-eager-%): test-eager-%: $$(addsuffix /.installed,$$(call eager_venv,$$*))
	@$(if $(call eager_venv,$*),$(call eager_venv,$*)/bin/python -m pytest --eager-tasks $(EAGER_ARGS) tests/caching tests/store, \
	echo "Python $* is absent: the cache and the store are not tested with eager tasks under it.")

packages: $(VENV)/.installed
	$(BIN)/python tests/packages.py $(foreach version,$(PACKAGE_VERSIONS),$(call python_of,$(version)))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python docs/pictures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is site/index.html."

$(VENV)/.bench: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/results.py

clean:
	rm -rf site $(VENV) $(BASE_VENV) $(DEMO_VENV) .venv-3.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
