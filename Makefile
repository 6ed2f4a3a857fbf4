# `make serve` and `make test` set up what they need: a virtual environment with everything in it.

VENV ?= .venv
MODEL ?= pocket
ARGS ?=
# A worker a core, hyperthreads counted: most tests wait for servers. Tests of one server share a worker.
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist loadgroup

python := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help serve test faults lint format bench peers clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'REPRISE_TORCH=cpu|cuda chooses the build of torch that is installed; by default the machine decides.'

serve: $(VENV)/.installed-serve ## Serve MODEL (default: pocket) on PORT (8000); further flags in ARGS
	@$(VENV)/bin/reprise serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.installed-test ## Run the tests (PYTEST_ARGS: arguments for pytest)
	@OMP_NUM_THREADS=1 $(python) -m pytest $(PYTEST_ARGS)

faults: $(VENV)/.installed-test ## Kill, freeze and poison the engine, at random moments too, and compare every stream
	@OMP_NUM_THREADS=1 $(python) -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint ## Check style, format and types
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-lint ## Format the code
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

bench: $(VENV)/.installed-test ## Measure this machine, the server alone, and the server beside its peers (two hours)
	@for name in floors use_cache load steps quantization sampling speculation scaling overhead startup gpu; do \
		echo "benchmarks.$$name" && $(python) -m benchmarks.$$name || exit; \
	done
	@$(python) -m benchmarks.peers --plot docs/peers.svg $(ARGS)

peers: $(VENV)/.installed-test ## Compare with other servers, built if need be (ARGS: --quick, --peers DIRECTORY)
	@$(python) -m benchmarks.peers $(ARGS)

clean: ## Remove the virtual environment and everything that was made by tools
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies; it is renewed when they, or how they are installed, change.
native := hatch_build.py $(wildcard server/reprise/engine/native/*.cpp server/reprise/engine/native/*.h)

$(VENV)/.installed-%: pyproject.toml constraints.txt scripts/setup $(native)
	@VENV='$(VENV)' scripts/setup $*
	@touch $@
