# What the README tells to type, for those who like it shorter.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

IMAGES ?= photos
KILLS ?= 100

.PHONY: demo test lint bench bench-images kill-test exact fuzz clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@ $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/msn-eval demo --out reports/demo

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/logistic.py
	$(BIN)/python benchmarks/inspect_file.py

# These need real JPEGs: make bench-images IMAGES=folder
bench-images: $(VENV)/installed-test
	$(BIN)/python benchmarks/decode.py --images $(IMAGES)
	$(BIN)/python benchmarks/low_shot.py --images $(IMAGES)

# SIGKILL at random instants of an evaluation on an image folder: make kill-test IMAGES=folder KILLS=100
kill-test: $(VENV)/installed-test
	$(BIN)/python tests/faults/kill_evaluation.py --data $(IMAGES) --kills $(KILLS)

# Properties tried by the thousand.
exact: $(VENV)/installed-test
	set -e; for script in tests/exact/*.py; do $(BIN)/python $$script; done

# One minute of made-up files for the code that looks at a stranger's file first.
fuzz: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz_headers.py -max_total_time=60

clean:
	rm -rf $(VENV)
