# Two commands: `make quickstart` runs the main job, `make test` passes the tests. Each makes the environment it needs.
# VENV=/path/to/env uses an existing environment instead of .venv.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.lit_transfer-installed

.PHONY: quickstart test test-full lint bench clean

quickstart: $(STAMP)
	$(BIN)/lit-transfer prepare --config configs/data/elpv.yaml
	$(BIN)/lit-transfer train --config configs/quickstart.yaml

# One thread a process: the two workers and the ranks that tests start share the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --full

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios measured side by side, on a machine that does nothing else meanwhile; benchmarks/README.md shows them. Without
# a GPU it takes hours, most of them rivals.py and elpv.py, which go on where they were stopped. rivals.py compares
# defaults, with rivals that it installs from the index; `--settings grid` adds other learning rates.
bench: $(STAMP)
	$(BIN)/lit-transfer prepare --config configs/data/elpv.yaml
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/elpv.py
	$(BIN)/python benchmarks/rivals.py
	$(BIN)/python benchmarks/table.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
