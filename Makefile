# `make simulate` sets up what running needs, `make test` adds what testing needs, `make docs` what builds the site.

PYTHON ?= python3
ARGS ?=
# Test processes; more than a few only pay for importing torch again.
TEST_PROCESSES ?= $(shell nproc | awk '{print ($$1 < 4) ? $$1 : 4}')

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile thousands of modules that are never imported.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing
DOCUMENTING := $(VENV)/.documenting

# The embedded model's products are too small to be split; a large one (ARGS) is faster with the cores there are.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
# Threads that spin while they wait make a shared machine several times slower.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: simulate lint test check-slow check docs setup

simulate: $(INSTALLED)
	@$(BIN)/python launchers/simulate.py $(ARGS)

test check-slow check: export OMP_NUM_THREADS := 1
test check-slow check: export HF_HUB_OFFLINE := 1

# Compilations for five architectures stand side by side: work is taken over from the process that has them.
PYTEST := $(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter's tests need processes of their own.
WITHOUT_INTERPRETER := $(PYTEST) --ignore=tests/kernels/interpreter
INTERPRETER := TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreter

# Lint, types and the tests that are not marked slow.
test: lint
	$(WITHOUT_INTERPRETER) -m "not slow" $(ARGS)

# The others.
check-slow: $(DEVELOPING)
	$(WITHOUT_INTERPRETER) -m slow $(ARGS)
	$(INTERPRETER) $(ARGS)

# Both of these; the test processes start once instead of twice.
check: lint
	$(WITHOUT_INTERPRETER) $(ARGS)
	$(INTERPRETER) $(ARGS)

lint: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; `mkdocs.yml` makes every warning an error. The variable silences a notice of the theme.
docs: $(DOCUMENTING)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

setup: $(DEVELOPING)

$(INSTALLED): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(DEVELOPING): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

$(DOCUMENTING): $(DEVELOPING)
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@
