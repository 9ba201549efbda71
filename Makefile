# Short forms of the commands in the README.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

IMAGES ?= photos
KILLS ?= 100
DAMAGES ?= 1000
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min((os.cpu_count() or 1) + 1, 5))")

.PHONY: demo test lint docs layouts bench bench-images parity kill-test corrupt faults exact fuzz gpu clean audit leaderboard

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/msn-eval demo --out reports/demo

# One thread per process: with more, processes that share the cores slow each other down. One process more than cores, because many
# tests wait for another program.
test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, into site/: builds without a network, runs the notebooks, and fails for a broken link.
docs: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/probes.py
	$(BIN)/python benchmarks/inspect_file.py

# Reads all layouts of checkpoints of tests/test_layouts.py, and writes their table: msn-eval ls checkpoints --tested
layouts: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/test_layouts.py

# GPU tests and benchmarks on one GPU in about five minutes, as one table to send us.
gpu: $(VENV)/installed-test
	$(BIN)/python benchmarks/gpu.py --out reports/benchmarks/gpu.md

# These need real JPEGs: make bench-images IMAGES=folder
bench-images: $(VENV)/installed-test
	$(BIN)/python benchmarks/decode.py --images $(IMAGES)
	$(BIN)/python benchmarks/augmentation.py --images $(IMAGES)
	$(BIN)/python benchmarks/low_shot.py --images $(IMAGES)

# Compares with the code of the authors, number by number: make parity MSN=folder DINO=folder DINOV2=folder SUNCET=folder
# SIMSIAM=folder, with checkouts of their repositories. What is not given is skipped.
parity: $(VENV)/installed-test
	$(BIN)/python benchmarks/parity.py --out reports/parity.md $(if $(MSN),--msn $(MSN)) $(if $(DINO),--dino $(DINO)) \
		$(if $(DINOV2),--dinov2 $(DINOV2)) $(if $(SUNCET),--suncet $(SUNCET)) $(if $(SIMSIAM),--simsiam $(SIMSIAM))

# What is known of the published numbers, with verdicts where ImageNet and weights are available: make audit DATA=/datasets/imagenet
audit: $(VENV)/installed
	$(BIN)/python benchmarks/audit.py --out reports/audit.md $(if $(DATA),--data $(DATA))

# Builds the page, the Markdown and the CSV of reports/leaderboard from its records.
leaderboard: $(VENV)/installed
	$(BIN)/python benchmarks/leaderboard.py

# Kills evaluations on an image folder, and kills, terminates or stops pre-training on embedded images, at random times:
# make kill-test IMAGES=folder KILLS=100
kill-test: $(VENV)/installed-test
	$(BIN)/python tests/faults/kill_evaluation.py --data $(IMAGES) --kills $(KILLS)
	$(BIN)/python tests/faults/kill_training.py --kills 100

# Damages records, predictions and caches at random, and looks for numbers that changed without a word: make corrupt DAMAGES=1000
corrupt: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/corruption.py --count $(DAMAGES)

# Tries every fault of tests/faults/faults.yaml with the real commands, runs its tests, and writes reports/reliability.md.
faults: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fault_list.py

# Complete versions of checks that the test suite samples: all sizes and lambdas of the logistic fits, 5,000 hostile names in every
# format and page of a report, and the regression gate on simulated data. Each check prints its log for reports/exact.
exact: $(VENV)/installed-test
	mkdir -p reports/exact
	$(BIN)/python tests/exact/exact_logistic.py > reports/exact/logistic.md
	$(BIN)/python tests/exact/hostile_names.py > reports/exact/names.md
	$(BIN)/python tests/exact/hostile_pages.py > reports/exact/pages.md
	$(BIN)/python tests/exact/simulate_gate.py > reports/exact/gate.md

# Fuzzes the code that reads the headers of untrusted files for one minute.
fuzz: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz_headers.py -max_total_time=60

clean:
	rm -rf $(VENV)
