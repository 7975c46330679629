# The one interface of the project: continuous integration, the commit hook and people call these.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= -c constraints.txt
WORKERS ?= 2
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks

.PHONY: setup demo live test check docs golden clean

setup: $(VENV)/.ok-dev

# Prompt to video on a CPU, with the checkpoint that comes with the package.
demo: $(VENV)/.ok-core
	$(BIN)/python examples/demo.py

# A page on which a video is made while you watch; see docs/live.md.
live: $(VENV)/.ok-app
	$(BIN)/videoar serve --threads 1

# One thread in each worker: a second one took half as much processor time again, and no less time.
test: $(VENV)/.ok-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

check: $(VENV)/.ok-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyrefly check
	$(BIN)/codespell

docs: $(VENV)/.ok-docs
	$(BIN)/zensical build --strict --clean

# Write the stored loss traces anew. Say in the commit why the numbers moved.
golden: $(VENV)/.ok-dev
	$(BIN)/python -m pytest -q -m golden --write-golden

clean:
	rm -rf site dist build .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that an extra is installed at the pinned versions.
$(VENV)/.ok-core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing VideoAR into $(VENV): a minute or two"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e .
	touch $@

$(VENV)/.ok-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing VideoAR with the extra $* into $(VENV): a minute or two"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
