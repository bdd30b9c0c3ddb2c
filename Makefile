# `make demo` and `make test` need Python 3.11 or newer, and nothing else installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test check clean

# A search on the embedded model, into a git-ignored folder; run again, it shows the finished run, or goes on with a stopped one.
demo: $(VENV)/.installed
	$(BIN)/lissom run zoo/demo --out $(DEMO) --resume

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

# Installs again only when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
