# Two commands on a fresh machine: make simulate, make test. Both need only Python >= 3.11 and make.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# Third parties neither phone home nor look for updates, weights or data on a network.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Compiled once and kept, also where a container says otherwise: tests start dozens of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help simulate compare deploy-demo faults test check format lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

simulate: $(STAMP) ## run the default experiment on the shipped model and data (more options: ARGS="...")
	@$(BIN)/proxymoe-simulate $(ARGS)

compare: $(STAMP) ## compare the ways to choose experts, at equal bytes
	@$(BIN)/proxymoe-simulate simulations/experiments/compare.toml $(ARGS)

faults: $(STAMP) ## kill, cut and corrupt everything, and check that nothing is lost (some: ARGS="--only transfer")
	@$(BIN)/python -m proxymoe.simulations.faults $(ARGS)

deploy-demo: $(STAMP) ## a coordinator and four devices on loopback, over TLS, for two rounds
	@$(BIN)/python -m proxymoe.simulations.deploy_demo $(ARGS)

test: check ## run every check, then the tests (a subset: ARGS="tests/common -k plan")
	$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

check: $(STAMP) ## check format, lint, types and import rules; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## format the code and repair what the linter can
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

lint: $(STAMP) ## lint only
	$(BIN)/ruff check

clean: ## remove the environment, caches and build output; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .coverage htmlcov
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is complete when the stamp exists, and rebuilt in place when the pins change.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    "$$python" -m venv --clear $(VENV) && exit 0; \
	    echo "error: $$python cannot create a virtual environment; install its venv module (Debian: python3-venv) and try again" >&2; \
	    exit 1; \
	  done; \
	  echo "error: ProxyMoE needs Python 3.11 or newer; found $$(python3 --version 2>/dev/null || echo none). Install it, or name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[server,simulation,dev]'
	@touch $@
