# Conveniences: everything here is `make .venv`, then one Python command.
VENV := .venv
BIN := $(VENV)/bin

FUZZ := --minutes 10

.PHONY: demo test test-slow test-lowest lint fuzz docs dist bench bench-try gpu-check clean

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

# The tests with the lowest versions of the dependencies that pyproject.toml allows, in .venv-lowest.
test-lowest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra dev --no-header \
		--python $(BIN)/python pyproject.toml --output-file build/lowest.txt
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python -r build/lowest.txt
	$(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n logical --dist worksteal

# The documentation site, in build/site; warnings are errors.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python docs/site.py build/pages
	$(BIN)/zensical build --strict --clean

# Wheel and sdist in dist/, checked; then the wheel trains, samples and evaluates the digits by itself.
dist: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6.1'
	rm -rf dist build/fresh
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	python3 -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build/fresh && bin/maskdm train digits --shrink 0.02 --out run \
		&& bin/maskdm sample run --num 4 --out grid.png && bin/maskdm evaluate run --num 64

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,app]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
