# make train: LeNet-5 learns handwritten digits on two worker processes.
# make test:  linters, type checker, import contracts and tests; make test-all: the slow ones too.
# Both make .venv when it is missing or older than the project's settings.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TRAIN ?= lenet5 --data digits --workers 2

.PHONY: train test test-all lint format clean
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(BIN)/windlass train $(TRAIN)

# What starts ranks has all cores for itself; the rest runs on as many processes as there are cores.
test: $(VENV)/tested lint
	$(BIN)/python -m pytest -m 'not mpi and not slow' --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest -m 'mpi and not slow'

test-all: $(VENV)/tested lint
	$(BIN)/python -m pytest -m ''

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Windlass needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[test,fast-jpeg]'
	@touch $@

clean:
	rm -rf $(VENV)
