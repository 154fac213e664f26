# make quickstart | test | test-slow [PART=models] | test-browser | test-newest | test-oldest | constraints | lint | format
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
PINS ?= constraints.txt
ARGS ?=
BIN := $(VENV)/bin
EVERY := dev,browser,scale
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(PINS:%=--constraint %)
# One thread each: on two cores, two processes of two threads wait for one another.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: install quickstart test tests test-slow test-browser test-newest test-oldest constraints lint format clean

$(BIN)/glsim: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable ".[$(EXTRAS)]"
	@touch $@

install: $(BIN)/glsim

quickstart: install
	rm -rf quickstart
	$(BIN)/glsim quickstart --out quickstart

test: install lint tests

tests: install
	$(PYTEST) $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(PART:%=tests/%) $(ARGS)

test-browser: install
	$(PIP_INSTALL) --editable ".[$(EXTRAS),browser]"
	$(BIN)/python -m pytest -m browser $(ARGS)

# The newest release of everything that pyproject.toml allows, looked up at every call.
test-newest:
	rm -f .venv-newest/bin/glsim
	$(MAKE) tests VENV=.venv-newest EXTRAS=$(EVERY) PINS=

# The lower bounds of pyproject.toml.
test-oldest:
	$(MAKE) tests VENV=.venv-oldest EXTRAS=$(EVERY) PINS=constraints-oldest.txt

# New pins of both files (docs/dependencies.md): of what a new environment gets, and of the lower bounds.
constraints:
	rm -rf .venv-newest
	$(MAKE) install VENV=.venv-newest EXTRAS=$(EVERY) PINS=
	.venv-newest/bin/python -m pip freeze --exclude-editable > constraints.txt
	.venv-newest/bin/python -m pip install --quiet uv
	.venv-newest/bin/uv pip compile --quiet --upgrade --resolution lowest-direct --python-version 3.11 \
		$(foreach extra,dev browser scale,--extra $(extra)) --no-header --no-annotate \
		pyproject.toml --output-file constraints-oldest.txt

lint: install
	$(BIN)/ruff check glsim tests docs benchmarks
	$(BIN)/ruff format --check glsim tests docs benchmarks
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix glsim tests docs benchmarks
	$(BIN)/ruff format glsim tests docs benchmarks

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest quickstart build dist *.egg-info
