# Each target makes what it needs in .venv, once. A bare machine needs Python >= 3.11 with pip.
#   make test PYTHON=python3.12     another interpreter (remove .venv first)

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo demo-full test test-all lint docs format clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/mpt-jax demo

demo-full: $(VENV)/.installed
	$(BIN)/mpt-jax demo --full

# One process per core, and one more for the time in which others wait. Whole modules go to a process
# (loadfile): their fixtures and programs are made once, and memory is freed between them. The order
# is that of tests/conftest.py. Bytecode is kept: compiling rewritten modules takes half of a start.
PROCESSES = $(shell $(BIN)/python -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.parity
	$(PYTEST) -m ''

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck --external-sources tpu/*.sh
	$(BIN)/python tests/words/lint.py

# Warnings are errors: a link to a page, heading or file that is not there fails.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist

# The stamps say what .venv holds; a change of the requirements makes them stale.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv and pip found; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The tested versions of this Python, where there is such a file.
CONSTRAINTS = $(shell $(BIN)/python -c 'import pathlib, sys; \
  p = pathlib.Path("constraints/py%d%d.txt" % sys.version_info[:2]); print(f"-c {p}" if p.exists() else "")')

$(VENV)/.installed: pyproject.toml $(wildcard constraints/*.txt) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev,parity]'
	@touch $@
