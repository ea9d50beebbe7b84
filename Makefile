# make install | demo | test | test-optional | test-all | docs | notebooks
# All run from a fresh clone; what is installed goes into .venv, img2dataset into .venv-img2dataset.

# PYTHON: any Python from 3.11 on; PIP_ARGS: for instance --index-url=...; JOBS: test processes.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHAPES := data/shapes/generated
QUICKSTART := runs/quickstart/checkpoints/last.ckpt
# One thread a test process: the tests' tensors are small.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

IMG2DATASET := .venv-img2dataset
OPTIONAL := tests/datamodules/test_download.py tests/datamodules/test_remote_faults.py \
	tests/tasks/test_segment_monitor.py tests/evaluation/test_demo.py

.PHONY: install install-optional demo lint docs notebooks test test-optional test-all clean

install: $(STAMP)

# The stamp makes a second `make` instant and independent of the network, until the dependencies change.
$(STAMP): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one or give make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; give make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[test]'
	@touch $@

demo: install
	$(BIN)/dtpvit fit --config configs/quickstart.yaml
	$(BIN)/dtpvit zeroshot --data $(SHAPES)/seen --templates $(SHAPES)/seen/templates.txt --checkpoint $(QUICKSTART)
	$(BIN)/dtpvit zeroshot --data $(SHAPES)/heldout --templates $(SHAPES)/heldout/templates.txt --checkpoint $(QUICKSTART)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Into site/; every warning, dead link and thing that a page would load over the network is an error. Not with --quiet, under
# which --strict overlooks warnings.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs the notebooks again and stores their outputs, which the site shows.
notebooks: install
	OMP_NUM_THREADS=1 $(BIN)/python docs/hooks/execute_notebooks.py

test: lint docs
	$(PYTEST)

# What `test` skips for want of packages: downloads by img2dataset, object stores, Weights & Biases, the page of the demo.
test-optional: install-optional
	PATH="$(CURDIR)/$(IMG2DATASET)/bin:$$PATH" $(PYTEST) $(OPTIONAL)

# The import at the end fails where tests would skip.
install-optional: install
	test -x $(IMG2DATASET)/bin/python || $(PYTHON) -m venv $(IMG2DATASET)
	$(IMG2DATASET)/bin/python -m pip install $(PIP_ARGS) --quiet img2dataset
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -e '.[demo,test-optional]'
	$(BIN)/python -c 'import gcp_storage_emulator.server, gcsfs, gradio, moto.server, s3fs, wandb'

test-all: lint docs
	$(PYTEST) -m "" -o faulthandler_timeout=3600

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
