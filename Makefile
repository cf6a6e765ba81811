# `make demo` and `make test` in a fresh clone need nothing typed before them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A container's images often set it; without bytecode each of the many processes would compile the project's 250 modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint bench bench-generation bench-online bench-speculative bench-inference gpu smollm2 docs clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Each file's tests in one process, on every core; a process computes with one thread, so that they don't wait for each other.
WORKERS ?= logical
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# With WITHIN, tests that haven't begun so many minutes after the start are left out.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile $(if $(WITHIN),--within $(WITHIN))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The folder of GSM8K with sft.jsonl and preferences.jsonl.
DATA ?= ../shared/data/gsm8k
bench: $(STAMP)
	$(BIN)/python benchmarks/training.py --data $(DATA)

# Generation beside transformers' and vLLM's, the latter where VLLM names a Python that has it.
bench-generation: $(STAMP)
	$(BIN)/python benchmarks/generation.py $(if $(VLLM),--vllm-python $(VLLM))

# One step of GRPO beside TRL's, phase by phase.
bench-online: $(STAMP)
	$(BIN)/python benchmarks/online.py

# Speculative decoding beside the engine without a draft and transformers' assisted generation.
bench-speculative: $(STAMP)
	$(BIN)/python benchmarks/speculative.py

# Votes, best of n and searches over steps at equal tokens, with a trained process reward.
bench-inference: $(STAMP)
	$(BIN)/python benchmarks/inference_compute.py

# On a machine with a GPU, where nothing can be installed: the environment where there is one, else the machine's own Python.
# `make gpu GPU="--wheels wheels --output DIR"` hands options on.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU)

smollm2: $(STAMP)
	$(BIN)/python examples/fetch_smollm2.py

# Write what is derived from the code, then the site, which fails where a link or an anchor leads nowhere.
docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is build/site/index.html"

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Once an environment, and again when what it is made from changes. torch goes first, so that everything else is built and
# resolved against the pinned one.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
