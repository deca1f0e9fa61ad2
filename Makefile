# make demo   make the environment and show the three modes
# make test   make the environment and run the tests
# make check  format, lint and types
# make bench  the benchmarks, as tables
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

.PHONY: demo test check bench format embedded-model clean

demo: $(VENV)/.ready
	$(RUN)python examples/demo.py

test: $(VENV)/.ready
	$(RUN)python -m pytest

check: $(VENV)/.ready
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy

bench: $(VENV)/.ready
	$(RUN)python -m benchmarks.selection
	$(RUN)python -m benchmarks.large_index
	$(RUN)python -m benchmarks.embedded_model
	$(RUN)python -m benchmarks.startup
	$(RUN)python -m benchmarks.engine
	$(RUN)python -m benchmarks.fitting --values 4
	$(RUN)python -m benchmarks.tracing

format: $(VENV)/.ready
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

# Hours on two cores. Makes a model of the same recipe from a seed; the shipped one was trained in stages (its model card).
embedded-model: $(VENV)/.ready
	$(RUN)python -m training.train --out build/embedded
	$(RUN)python -m training.install build/embedded

# torch first and pinned: a range would fetch whatever is newest, with its CUDA packages.
$(VENV)/.ready: pyproject.toml requirements-torch.txt
	@echo "Making the environment in $(VENV), once: up to 6 GB, and some minutes in which pip says little."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vispa_graph needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Step 1 of 2: PyTorch, by far the largest download ..."
	$(RUN)python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@echo "Step 2 of 2: everything else, some 140 packages; this took four minutes on two busy cores ..."
	$(RUN)python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
