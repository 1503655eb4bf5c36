# Two commands do everything: `make tiny` and `make test`. Both install first; an installation that is current costs nothing.
# The Python that makes .venv; 3.11, 3.12 or 3.13.
PYTHON ?= python3
# Folder of runs; the tiny run is $(RUNS)/tiny.
RUNS ?= runs
# 1 installs the CPU build of vLLM as well (a machine with a GPU gets vllm without it).
WITH_VLLM ?=
# Overrides of the recipe, for example ARGS="seed=1".
ARGS ?=

BIN := .venv/bin

.PHONY: help install tiny test test-slow test-gpu clean

help:
	@echo "make tiny       install, train a small MiniMax through every stage on this machine, print the table"
	@echo "make test       install, then linter, type checker and the quick tests"
	@echo "make test-slow  install, then the slow tests"
	@echo "make test-gpu   install, then the tests that need an NVIDIA GPU"
	@echo "make install    make .venv and install (WITH_VLLM=1: with the CPU engine)"
	@echo "make clean      remove .venv, caches and build files; runs stay"

install:
	@$(PYTHON) scripts/install.py $(if $(WITH_VLLM),--with-vllm)

tiny: install
	$(BIN)/posttrain run configs/tiny.yaml output_dir=$(RUNS) $(ARGS)
	$(BIN)/posttrain report $(RUNS)/tiny

test: install
	@$(BIN)/python scripts/test.py

test-slow: install
	@$(BIN)/python scripts/test.py --marker slow

test-gpu: install
	@$(BIN)/python scripts/test.py --marker gpu

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
