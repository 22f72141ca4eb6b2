# Every target sets up .venv by itself: a virtual environment with the pinned versions of constraints.txt and the package.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
FUZZ_MINUTES ?= 10
ENV    := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: help quickstart test test-all mutants fuzz crash browser lint format bench classic-bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## SFT → reward model → PPO, and GRPO, from scratch: offline, two cores, minutes
	$(BIN)/tilt quickstart

test: lint  ## lint, types and the tests
	$(ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-all: lint  ## the same with the slow tests
	$(ENV) $(BIN)/python -m pytest -q -n $(WORKERS)

mutants: $(VENV)/.installed-dev  ## planted faults and mechanical mutants of the mathematics: does a test notice each?
	$(ENV) $(BIN)/python tests/mutants/run.py --workers $(WORKERS)

crash: $(VENV)/.installed-dev  ## kill runs at random points, resume them, and compare every bit (minutes)
	$(ENV) $(BIN)/python tests/crash/run.py

browser: $(VENV)/.installed-dev  ## the page in a headless Chromium (from the system), with axe-core where npm is there
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,browser]"
	test -e node_modules/axe-core/axe.min.js || npm install --silent --no-save axe-core || true
	$(ENV) $(BIN)/python -m pytest -q tests/browser

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(VENV)/.installed-dev  ## hostile settings, data, templates, checkpoints and run folders for FUZZ_MINUTES: every failure must be a sentence
	$(ENV) $(BIN)/python tests/fuzz/fuzzing.py --minutes $(FUZZ_MINUTES)

bench: $(VENV)/.installed-dev  ## the benchmarks of language models, one after the other
	@set -e; found=0; for file in $(filter-out benchmarks/classic.py benchmarks/versus_sb3.py benchmarks/versus_trl.py benchmarks/estimates.py,$(wildcard benchmarks/*.py)); do \
	  test -e "$$file" || continue; found=1; echo "== $$file"; HF_HUB_OFFLINE=1 $(BIN)/python "$$file"; \
	done; test $$found = 1 || { echo "benchmarks/ holds no benchmark yet"; exit 1; }

classic-bench: $(VENV)/.installed-dev  ## control: every preset over five seeds into docs/classic/control.md (hours), and steps a second against Stable-Baselines3
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/classic.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/versus_sb3.py

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Tilt needs Python 3.11 or newer, and '$(PYTHON)' is not on the PATH: make PYTHON=/path/to/python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Tilt needs Python 3.11 or newer; %s is %d.%d. Name another one: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed
