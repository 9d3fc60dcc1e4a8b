# irqrouter: every target makes what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format agent bench fuzz stress torture clean

help:  ## what there is to run
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)  ## the whole story on a real VM, in seconds
	$(BIN)/irqrouter demo

test: $(STAMP)  ## every test, the linters and type checkers among them
	$(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, types, import direction
	$(BIN)/python -m pytest -q tests/test_checks.py

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

agent: $(STAMP)  ## the C agent and its example VMM, into build/agent
	$(MAKE) --no-print-directory -C agent

bench: $(STAMP)  ## ratios against the bare system calls in C; writes build/bench.json
	$(BIN)/python -m bench

fuzz: $(STAMP)  ## a million frames by a hostile client against the service, beside an honest one
	$(BIN)/python -m tests.service.fuzz --frames 1000000 --seed 1

stress: $(STAMP)  ## a million events against invalidations, on a real VM
	$(BIN)/irqrouter stress --events 1000000 --seed 1

torture: $(STAMP)  ## the service killed 200 times beside a busy VM, and not an event lost
	$(BIN)/irqrouter torture --kills 200 --seed 1

clean:  ## remove what the targets made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
