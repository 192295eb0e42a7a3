PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-system lint clean

demo: $(INSTALLED)  ## reconstruct the bundled sample into out/
	$(BIN)/python -m flows reconstruct tests/data/mug out

test: lint  ## lint, type check and the tests
	$(BIN)/python -m pytest -m 'not system'

test-system: $(INSTALLED)  ## workers, killed runs, the whole stack; CI runs it as well
	$(BIN)/python -m pytest -m system

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) out
