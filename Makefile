# Conveniences: everything here is `make .venv`, then one Python command.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu-check clean

demo: $(VENV)/installed
	$(BIN)/maskdm train digits --out runs/digits
	$(BIN)/maskdm sample runs/digits --num 64 --out runs/digits/grid.png
	$(BIN)/maskdm evaluate runs/digits
	@echo "grid of samples: runs/digits/grid.png    loss plot: runs/digits/loss.png"

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

gpu-check: $(VENV)/installed
	PYTHON=$(abspath $(BIN)/python) benchmarks/gpu.sh gpu-check

$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
