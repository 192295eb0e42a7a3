PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# a process of pytest runs whole files, in the order that tests/conftest.py gives them
FILES := --dist loadfile --no-loadscope-reorder
# and often waits for another process
PROCESSES := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 3 / 2 )))

.PHONY: help demo test test-system lint stack stack-down stack-reset clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## reconstruct the bundled sample into out/
	$(BIN)/python -m flows reconstruct tests/data/mug out

test: lint  ## lint, and run the tests
	$(BIN)/python -m pytest -m 'not system' --numprocesses $(PROCESSES) $(FILES)

test-system: $(INSTALLED)  ## run the tests of the whole stack, of killed runs and of the UI
	$(BIN)/python -m pytest -m system --numprocesses $(PROCESSES) $(FILES)

lint: $(INSTALLED)  ## check style, types, imports between rooms and licences
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m infra.licences

stack: $(INSTALLED)  ## run the whole system on this machine until Ctrl-C: Prefect, S3, workers
	@$(BIN)/python -m infra.stack up

stack-down: $(INSTALLED)  ## stop a stack that was started elsewhere
	@$(BIN)/python -m infra.stack down

stack-reset: $(INSTALLED)  ## stop the stack and remove its state: runs, captures, assets, keys
	@$(BIN)/python -m infra.stack reset

$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[test]'
	touch $@

clean:  ## remove the virtual environment and out/
	rm -rf $(VENV) out
