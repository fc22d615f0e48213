# SPDX-License-Identifier: BSD-3-Clause
# Two commands for everybody: `make demo` and `make test`. Each sets up what it needs and says so.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes side by side (0: none but pytest's own). A guest takes a CPU; other tests wait a good part of the time.
QEMU_JOBS ?= $(shell nproc)
JOBS ?= $(shell expr $(QEMU_JOBS) + 1)
PYTEST := $(BIN)/python -m pytest --dist worksteal
# Without root, and without what the lab is for
ANYWHERE := tests/unit tests/conformance tests/migration
# Without bytecode kept, each of many processes compiles what it imports, and pytest rewrites Hypothesis each time.
export PYTHONDONTWRITEBYTECODE :=
# make test: reduced counts; make soak: the full ones
export VFIO_USER_SOAK ?=

.PHONY: help demo test lint unit tests no-guest coverage qemu soak bench lab lab-or-skip clean

help:
	@echo "make demo   see it work: an e1000 driven and moved under load, and a guest where QEMU is found"
	@echo "            make demo PLOT=run.svg draws the migrations too"
	@echo "make test   everything: lint, types, unit, conformance, migration, and QEMU with a real guest (as root)"
	@echo "make lint   ruff and mypy --strict"
	@echo "make unit   lint, unit, conformance and migration tests only: without root, and without what the lab is for"
	@echo "make coverage  the unit, conformance and migration tests once more, and the lines that none of them ran"
	@echo "make soak   the conformance, migration and end-to-end tests with the full counts"
	@echo "make bench  the table of ratios beside the marks"
	@echo "make lab    QEMU, guest and libvfio-user into the cache folder"

$(VENV)/.runtime: pyproject.toml
	@echo "== Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make a virtual environment: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -e . 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import vfio_user.protocol, trio, construct, click, rich'
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "== test tools in $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import pytest, hypothesis, mypy, scapy'
	@touch $@

$(VENV)/.plot: $(VENV)/.runtime
	@echo "== matplotlib in $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[plot]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import matplotlib.figure'
	@touch $@

demo: $(VENV)/.runtime $(if $(PLOT),$(VENV)/.plot)
	@$(BIN)/vfio-user demo $(if $(PLOT),--plot $(PLOT))

lint: $(VENV)/.test
	@echo "== ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo "run: $(BIN)/ruff format"; exit 1; }
	@echo "== mypy --strict"
	@$(BIN)/mypy

unit: lint tests

tests: $(VENV)/.test
	@echo "== unit, conformance and migration tests"
	@$(PYTEST) -n $(JOBS) $(ANYWHERE)

coverage: $(VENV)/.test
	@$(BIN)/coverage run -m pytest $(ANYWHERE)
	@$(BIN)/coverage report --skip-covered | tail -n 40

lab: $(VENV)/.runtime
	@$(BIN)/vfio-user lab

# Those of the lab that boot no guest mostly wait for alarms; they come first, so that others run meanwhile.
no-guest: $(VENV)/.test
	@echo "== unit, conformance and migration tests, and libvfio-user's own programs"
	@$(PYTEST) -n $(JOBS) -m "not qemu" tests/qemu $(ANYWHERE)

qemu: $(VENV)/.test
	@echo "== QEMU with a real guest"
	@$(PYTEST) -n $(QEMU_JOBS) -m qemu tests/qemu

lab-or-skip: $(VENV)/.runtime
	@echo "== the lab: QEMU, guest, libvfio-user (cached; the first time takes a few minutes)"
	@$(BIN)/vfio-user lab || { [ "$(CI)" != true ] || exit 1; echo "No lab: what needs it is skipped below."; }

# One stage after the other, and at the end, also of one that failed, how long each took.
test:
	@times=; for stage in lint lab-or-skip no-guest qemu; do \
	    begun=$$(date +%s); $(MAKE) --no-print-directory $$stage; status=$$?; \
	    times="$$times $$stage $$(($$(date +%s) - begun)) s,"; \
	    [ $$status = 0 ] || break; \
	done; echo "== time:$${times%,}"; exit $$status

soak: $(VENV)/.test
	@$(BIN)/vfio-user lab
	@VFIO_USER_SOAK=1 $(BIN)/python -m pytest tests/conformance tests/migration tests/qemu

bench: $(VENV)/.test
	@$(BIN)/python -m vfio_user.benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
