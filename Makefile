PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# a process of pytest runs whole files, in the order that tests/conftest.py gives them
FILES := --dist loadfile --no-loadscope-reorder
# and often waits for another process
PROCESSES := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 3 / 2 )))
WITH_TORCH := $(VENV)/.with-torch
WHEELS_ONLY := build/wheels-only
# every other view of the sample, to be quicker
WITHOUT_CAMERAS := build/demo/hen

.PHONY: help demo gpu test test-trellis test-system test-faults lint stack stack-down stack-reset clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## reconstruct the bundled samples into out/: one with cameras, one without
	$(BIN)/python -m flows reconstruct tests/data/mug out
	@mkdir -p $(WITHOUT_CAMERAS)/views $(WITHOUT_CAMERAS)/depth
	cp tests/data/hen/views/*[02468].jpg $(WITHOUT_CAMERAS)/views
	cp tests/data/hen/depth/*[02468].png $(WITHOUT_CAMERAS)/depth
	$(BIN)/python -m flows reconstruct $(WITHOUT_CAMERAS) out

gpu:  ## set up .venv to run TRELLIS on an NVIDIA GPU: adds torch
	@nvidia-smi --list-gpus 2>/dev/null || { \
	  echo "No NVIDIA driver answers here (nvidia-smi): TRELLIS would run on the CPU only, very slowly."; \
	  echo "torch and its CUDA libraries are about 3 GB. The download starts in 10 seconds; Ctrl-C stops it."; sleep 10; }
	@$(MAKE) --no-print-directory $(WITH_TORCH)

test: lint  ## lint, and run the tests
	$(BIN)/python -m pytest -m 'not system and not faults and not trellis' --numprocesses $(PROCESSES) $(FILES)

test-trellis: $(WHEELS_ONLY)/.installed  ## install the extra `gpu` from wheels alone, and run the tests of the TRELLIS network on the CPU
	cd $(WHEELS_ONLY) && bin/capture2mesh weights list
	# no compiler, no git, no CUDA toolkit: nothing but this environment is on the path
	PATH=$(CURDIR)/$(WHEELS_ONLY)/bin $(CURDIR)/$(WHEELS_ONLY)/bin/python -m pytest tests/trellis --numprocesses auto $(FILES)

test-system: $(INSTALLED)  ## run the tests of the whole stack and of the UI, and the quick ones of killed runs
	$(BIN)/python -m pytest -m 'system and not faults' --numprocesses $(PROCESSES) $(FILES)

test-faults: $(INSTALLED)  ## run the long tests of what goes wrong: killed processes, lost machines, many uploads at once
	$(BIN)/python -m pytest -m faults --numprocesses $(PROCESSES) $(FILES)

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

$(WITH_TORCH): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[gpu]'
	touch $@

$(WHEELS_ONLY)/.installed: pyproject.toml infra/constraints.txt
	rm -rf $(WHEELS_ONLY)
	$(PYTHON) -m venv $(WHEELS_ONLY)
	$(WHEELS_ONLY)/bin/python -m pip install --quiet --only-binary :all: --constraint infra/constraints.txt \
	  '.[gpu]' pytest pytest-timeout pytest-xdist point-cloud-utils
	touch $@

clean:  ## remove the virtual environment, build/ and out/
	rm -rf $(VENV) build out
