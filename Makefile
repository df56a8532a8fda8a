# `make quickstart` and `make test` are all a fresh machine needs (Python 3.11+, pip, gcc).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where there is no GPU, hold torch to a version that has a CPU build.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

.PHONY: help setup setup-vllm quickstart quickstart-image bench gpu-check test test-fast test-vllm chaos fuzz lint format typecheck generators shapes-clip docs clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed ## create .venv and install everything

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@touch $@

setup-vllm: .venv-vllm/.installed ## a second environment for VLM judges on vLLM (CPU build where there is no GPU; 4.4 GB)

.venv-vllm/.installed: jobs/setup_vllm.py $(VENV)/.installed
	$(BIN)/python -m jobs.setup_vllm .venv-vllm
	@touch $@

quickstart: setup ## RL on the shipped text-to-video generator, on the CPU, in a few minutes
	$(BIN)/rushes train configs/quickstart.yaml

quickstart-image: setup ## the same for text-to-image
	$(BIN)/rushes train configs/quickstart-image.yaml

bench: setup ## speed against the bare arithmetic and a plain loop, on an idle machine (about 20 minutes)
	$(BIN)/rushes bench

gpu-check: setup ## what this product does on the GPU of this machine (about 8 minutes; `GPU_CHECK="--device cpu --tiny"` tries it without one)
	$(BIN)/python -m benchmarks.gpu.check $(GPU_CHECK)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test: setup ## the whole test suite (no GPU, no network; about 8 minutes on 2 cores): its last line says how long it took
	$(PYTEST) --durations 10

test-fast: setup ## what needs neither Ray nor many seconds (marked slow: compilers, processes, most families): less than 3 minutes
	$(PYTEST) -m "not ray and not slow"

test-vllm: setup-vllm ## the tests that run vLLM (about 3 minutes)
	$(BIN)/python -m pytest tests/rewards/test_vllm_live.py

chaos: setup ## a run whose actors and nodes are killed all the time, against the same run undisturbed (about 8 minutes)
	$(BIN)/python -m benchmarks.resilience.chaos

fuzz: setup ## thousands of bad inputs over everything that reads what others have written (about 5 minutes)
	$(BIN)/python -m benchmarks.resilience.fuzz

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generators: setup ## make the two shipped generators again (about 45 minutes each)
	$(BIN)/python -m jobs.shapes.make image
	$(BIN)/python -m jobs.shapes.make video

shapes-clip: setup ## make the CLIP of the shapes again (about 20 minutes of one core)
	$(BIN)/python -m jobs.shapes.clip

docs: setup ## regenerate docs/config.md and configs/schema.json
	$(BIN)/rushes config --docs > docs/config.md
	$(BIN)/rushes config --schema > configs/schema.json

clean: ## remove the virtual environment and caches (not runs/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
