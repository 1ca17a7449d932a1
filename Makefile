# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# All of it stays in .venv inside this folder; nothing but the package index is reached.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test fuzz faults check clean

help:
	@echo "make demo    install, then the main job on made clips (two minutes)"
	@echo "make test    install, then all tests"
	@echo "make fuzz    FILES=2000 damaged videos, each accounted for (../shared/data)"
	@echo "make faults  ROUNDS=200 crashes of a real run, and what comes of it"
	@echo "make check   ruff and mypy"

install: $(VENV)/.installed

# uv installs the set in seconds where pip takes minutes, but reads none of pip's settings: these are
# handed on. Where uv can't be had, pip does it. Bytecode is compiled now, once: importing diffusers
# from source takes three times as long, in every worker.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vidpipe needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	@set -e; setting() { $(BIN)/python -m pip config get "global.$$1" 2>/dev/null || true; }; \
	export UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$(setting find-links)}}"; \
	export UV_INDEX_URL="$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$(setting index-url)}}"; \
	for name in UV_FIND_LINKS UV_INDEX_URL; do eval "test -n \"\$$$$name\"" || unset $$name; done; \
	echo "installing vidpipe and its packages into $(VENV)"; \
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]' \
		|| $(BIN)/python -m pip install --quiet -e '.[dev]'
	@$(BIN)/python -m compileall -q manifests stages pipeline trainer
	@touch $@

demo: install
	$(BIN)/vidpipe demo

test: install
	$(BIN)/python -m pytest

# Damaged videos through probe, score and decoding; another SEED makes other ones.
fuzz: install
	$(BIN)/python tests/faults/fuzz.py $(or $(FILES),2000) --seed $(or $(SEED),0)
	$(BIN)/python tests/faults/fuzz.py $(or $(FILES),2000) --seed $(or $(SEED),0) --run

faults: install
	$(BIN)/python tests/faults/crashes.py $(or $(ROUNDS),200) --seed $(or $(SEED),0)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache vidpipe-demo *.egg-info
