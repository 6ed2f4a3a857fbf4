# `make serve` and `make test` set up what they need: a virtual environment with everything in it.

VENV ?= .venv
MODEL ?= pocket
ARGS ?=
# A worker a core, hyperthreads counted: most tests wait for servers. Tests of one server share a worker.
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist loadgroup

python := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help serve test lint format bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'REPRISE_TORCH=cpu|cuda chooses the build of torch that is installed; by default the machine decides.'

serve: $(VENV)/.installed-serve ## Serve MODEL (default: pocket) on PORT (8000); further flags in ARGS
	@$(VENV)/bin/reprise serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.installed-test ## Run the tests (PYTEST_ARGS: arguments for pytest)
	@OMP_NUM_THREADS=1 $(python) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint ## Check style, format and types
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-lint ## Format the code
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

bench: $(VENV)/.installed-test ## Measure this machine, then the server with and without its cache and under load
	@$(python) -m benchmarks.floors
	@$(python) -m benchmarks.use_cache
	@$(python) -m benchmarks.load

clean: ## Remove the virtual environment and everything that was made by tools
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies; it is renewed when they, or how they are installed, change.
$(VENV)/.installed-%: pyproject.toml constraints.txt scripts/setup
	@VENV='$(VENV)' scripts/setup $*
	@touch $@
