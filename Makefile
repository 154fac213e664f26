# make quickstart | make test | make lint | make format
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-slow test-browser lint format clean

$(BIN)/glsim: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(BIN)/glsim

quickstart: install
	rm -rf quickstart
	$(BIN)/glsim quickstart --out quickstart

test: install lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-browser: install
	$(BIN)/python -m pip install --quiet --editable ".[dev,browser]"
	$(BIN)/python -m pytest -m browser

lint: install
	$(BIN)/ruff check glsim tests docs benchmarks
	$(BIN)/ruff format --check glsim tests docs benchmarks
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix glsim tests docs benchmarks
	$(BIN)/ruff format glsim tests docs benchmarks

clean:
	rm -rf $(VENV) quickstart build dist *.egg-info
