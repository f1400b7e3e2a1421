# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo
DEMO_EPOCHS ?= 8

.PHONY: help demo test test-only lint types docs clean

help:
	@echo "make demo   create the environment, train and compare four ResNet-4 variants on the digits"
	@echo "make test   create the environment, lint, type-check, run the tests"
	@echo "make test-only   the same without lint and types"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove the environment and every build output (runs/ is kept)"

# One stamp for everything that pip installs: editing pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/neuralode-coupled compare --model resnet4 --variants baseline,anode,anodev2-1,anodev2-2 \
		--data digits --seeds 0 --epochs $(DEMO_EPOCHS) --out $(DEMO_OUT)

test: lint types test-only

test-only: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
