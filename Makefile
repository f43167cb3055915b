# Every target makes the .venv it needs, once per content of pyproject.toml and constraints.txt.
#
#   ARGS         passed on:  make serve ARGS="--port 9000"    make test ARGS="tests/model -k solver"
#   BENCH        which:  make bench BENCH=growth
#   PYTHON       the interpreter the .venv is made with; by default the first suitable one found
#   TORCH_INDEX  one more package index; on Linux PyPI's torch brings gigabytes of CUDA, an index of CPU builds does not

ARGS ?=
BENCH ?= engine_overhead
PYTHON ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
TORCH_HINT := On Linux, TORCH_INDEX=<an index of CPU builds of torch> saves gigabytes.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
LOCKS := deploy/locks
# The libraries of TensorRT have another index, and other files there.
LOCK = $(BIN)/uv pip compile --quiet pyproject.toml $(addprefix --extra ,$(2)) --constraint constraints.txt --generate-hashes \
    --universal --python-version 3.11 --no-header --no-annotate --output-file $(LOCKS)/$(1).txt
SERVING := $(VENV)/.serve-$(KEY)
TESTING := $(VENV)/.dev-$(KEY)

.PHONY: help serve test lint format bench bench-check lock clean
.DEFAULT_GOAL := help

help: ## Show the targets.
	@awk -F ': .*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: $(SERVING) ## Start the whole service on this machine: http://127.0.0.1:8000
	@exec $(BIN)/python -m service $(ARGS)

test: $(TESTING) ## Run every test; ARGS="tests/model -k solver" runs some, ARGS=--cov tells what they reach.
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(TESTING) ## Check format, style and types.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(TESTING) ## Format the code, and mend what can be mended by itself.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(TESTING) ## Run a benchmark: make bench BENCH=growth
	@exec $(BIN)/python -m bench.$(BENCH) $(ARGS)

bench-check: $(TESTING) ## Compare cheap ratios with those on record.
	@exec $(BIN)/python -m bench.check $(ARGS)

lock: $(TESTING) ## Write deploy/locks: the packages of `make serve` and of the images, with the hashes of their files.
	@mkdir -p $(LOCKS)
	@$(call LOCK,serve,serve minilm)
	@$(call LOCK,api,otel serve-text)
	@$(call LOCK,worker-cpu,cpu otel serve-text minilm)
	@$(call LOCK,worker,gpu otel serve-text minilm) --no-emit-package tensorrt-cu13-libs

clean: ## Remove the virtual environment and all caches.
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.%-$(KEY): | $(BIN)/python
	@echo "Installing the $* packages into $(VENV) … $(if $(TORCH_INDEX),,$(if $(filter dev,$*),$(TORCH_HINT)))"
	@{ $(if $(wildcard $(LOCKS)/$*.txt), \
	    $(INSTALL) --no-deps --require-hashes --requirement $(LOCKS)/$*.txt && $(INSTALL) --no-deps --editable ., \
	    $(INSTALL) --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[$*]'); \
	} >>$(LOG) 2>&1 || { \
	    echo "error: the packages could not be installed (is a package index reachable?): see $(LOG)" >&2; exit 1; }
	@rm -f $(VENV)/.$*-* && touch $@

$(BIN)/python:
	@set -- $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14); for each in "$$@"; do \
	    "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && python=$$each && break; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed, and none of these is: $$*" >&2; exit 1; fi; \
	"$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || { \
	    echo "error: $$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	mkdir -p $(VENV) && "$$python" -m venv $(VENV) >$(LOG) 2>&1 || { \
	    echo "error: $(VENV) could not be made: see $(LOG)" >&2; rm -f $@; exit 1; }
