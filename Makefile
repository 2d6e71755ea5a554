# Two commands on a fresh machine: `make train` and `make test`. Each makes .venv first, if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test test-slow test-slurm test-faults reliability check docs format clean

train: $(INSTALLED)
	$(BIN)/python -m titan.train

# Three at a time, on two cores as on more: most tests wait for processes that they have started.
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

# Apart from each other: sixteen ranks would starve the processes that the other tests start and wait for.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile tests/parallel tests/data
	$(BIN)/python -m pytest -q -m slow -n 3 --dist worksteal --ignore tests/parallel --ignore tests/data

# A real SLURM cluster of four nodes on this machine: needs root and Debian's packages, which it installs.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slurm tests/slurm

# FAULT_SEED=7 draws other moments; FAULT_ROUNDS=3 goes through all of it three times.
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -q -m faults -n 3 --dist worksteal tests/faults

# The same, and what it found into docs/reliability.md.
reliability: $(INSTALLED)
	$(BIN)/python benchmarks/reliability.py

check: $(INSTALLED) docs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo

# The pages of docs/ as a site, in build/site; a link that leads nowhere is an error. Fetches nothing.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs multirun
