# make train   install into .venv, then train DLRM on unified tables (python -m recemb.train +experiment=criteo)
# make test    install into .venv what tests need, then run them
# make lint    ruff, mypy
#
# PYTHON   interpreter that makes the environment, 3.11 or 3.12
# VENV     the environment
# BACKEND  cpu, or cuda for the CUDA builds of torch and fbgemm
# ARGS     more arguments for the command, e.g. make train ARGS="embedding=full seed=1"
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BACKEND ?= cpu
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SHIM_cpu := ./tools/fbgemm-cpu-shim
SHIM_cuda :=
REQUIREMENTS := pyproject.toml constraints.txt tools/fbgemm-cpu-shim/pyproject.toml

.PHONY: train test lint

train: $(VENV)/recemb-$(BACKEND).stamp
	$(BIN)/python -m recemb.train +experiment=criteo $(ARGS)

test: $(VENV)/tests-$(BACKEND).stamp
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/lint-$(BACKEND).stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
	    f"recemb needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first, at one exact version: what comes after asks for torch in looser words and is content with this one.
$(VENV)/recemb-$(BACKEND).stamp: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) "torch==2.13.0"
	$(PIP) $(SHIM_$(BACKEND)) -e ".[$(BACKEND)]"
	touch $@

$(VENV)/tests-$(BACKEND).stamp: $(VENV)/recemb-$(BACKEND).stamp
	$(PIP) -e ".[$(BACKEND),test]"
	touch $@

$(VENV)/lint-$(BACKEND).stamp: $(VENV)/tests-$(BACKEND).stamp
	$(PIP) -e ".[$(BACKEND),dev]"
	touch $@
