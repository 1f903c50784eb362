# The two commands: `make demo` and `make test`. Each sets up .venv by itself; run again, it reuses it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test fast lint docs linkcheck setup clean

demo: $(READY)
	$(BIN)/eyetune demo --out demo

test: $(READY) lint
	$(BIN)/python -m pytest

fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, offline; docs/_build/html/index.html is where to begin. A warning is an error.
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . docs/_build/html
	@echo "Open docs/_build/html/index.html"

# Every address the pages name, asked over the network.
linkcheck: $(READY)
	$(BIN)/python -m sphinx -q -c docs -b linkcheck . docs/_build/linkcheck

setup: $(READY)

# The stamp is written last, so that an installation that was interrupted starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "EyeTune needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) (PyTorch is a large download; a few minutes, once) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) demo docs/_build
