PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-system lint stack stack-down stack-reset clean

demo: $(INSTALLED)  ## reconstruct the bundled sample into out/
	$(BIN)/python -m flows reconstruct tests/data/mug out

test: lint  ## lint, type check and the tests
	$(BIN)/python -m pytest -m 'not system' --numprocesses auto --dist loadfile

test-system: $(INSTALLED)  ## workers, killed runs, the whole stack; CI runs it as well
	$(BIN)/python -m pytest -m system --numprocesses auto --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy infra/stack.py infra/deploy.py infra/prefect_server.py

stack: $(INSTALLED)  ## the whole system on this machine, until Ctrl-C: Prefect, S3, workers
	@$(BIN)/python -m infra.stack up

stack-down: $(INSTALLED)  ## stop a stack that was started elsewhere
	@$(BIN)/python -m infra.stack down

stack-reset: $(INSTALLED)  ## stop the stack and remove its state: runs, captures, assets, keys
	@$(BIN)/python -m infra.stack reset

$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) out
