# Conveniences: everything here is `make .venv`, then one Python command.
VENV := .venv
BIN := $(VENV)/bin

FUZZ := --minutes 10

.PHONY: demo test test-slow lint fuzz bench bench-try gpu-check clean

demo: $(VENV)/installed
	$(BIN)/maskdm train faces --out runs/faces
	$(BIN)/maskdm sample runs/faces --num 64 --out runs/faces/grid.png
	$(BIN)/maskdm evaluate runs/faces
	$(BIN)/python examples/faces_attributes.py runs/faces
	@echo "grid of samples: runs/faces/grid.png    loss plot: runs/faces/loss.png"

# A worker for each core, with one thread: small networks gain nothing from more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# Every table and figure of the paper at its smallest, each killed and continued.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal -m reproduce

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Damaged and strange files of all kinds, ten minutes on two cores: make fuzz FUZZ="--minutes 1 --seed 7".
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

# Every benchmark in tiny sizes, to see that the scripts run; the figures mean nothing.
bench-try: $(VENV)/installed
	DRY_RUN=1 PYTHON=$(abspath $(BIN)/python) benchmarks/gpu.sh $(shell mktemp -d)

gpu-check: $(VENV)/installed
	PYTHON=$(abspath $(BIN)/python) benchmarks/gpu.sh gpu-check

$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
