# make demo      a swarm of four peers on this machine, five minutes on two fast cores after the install
# make test      ruff, mypy and the fast tests;  make test-all: the slow tests, too
# make lint      ruff and mypy only;  make format: let ruff rewrite what it can
# make install   only the environment (.venv);  make clean: remove it and everything made here
#
# PYTHON=python3.12 make demo   takes another interpreter;  VENV=/some/where another folder.
# TEST_PROCESSES=0 make test    all tests in one process, one after the other.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
DEMO_FLAGS ?=
TEST_PROCESSES ?= 2

.PHONY: install demo test test-all lint format clean

install: $(READY)

demo: $(READY)
	@echo "== the demo: a swarm of peers on loopback, each with its own data"
	$(BIN)/python -m scripts.demo $(DEMO_FLAGS)

test: lint
	@echo "== the fast tests"
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

test-all: lint
	@echo "== all tests, the slow ones included"
	$(BIN)/python -m pytest -m ""

lint: $(READY)
	@echo "== style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output swarm_output
	find coordinator peer scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Made last, so that an install that broke off is begun again; newer than these files, it is up to date.
$(READY): pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. On Debian: apt install python3"; \
	  echo "If a newer one has another name: PYTHON=python3.12 make ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian: apt install python3-venv"; exit 1; }
	@echo "== an environment in $(VENV), with PyTorch and what else is needed: a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $@
