# Everything happens in a virtual environment in this folder; `make help` says what there is.
#
#   VENV=path          another environment          PYTHON=path       another Python 3.11
#   PYTEST_ARGS=...    more for pytest (-n0: one process)   RUN_ARGS=...      more for fedbd run

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python,$(shell $(name) -c '$(IS_311)' 2>/dev/null && echo $(name))))
PYTEST_ARGS ?=
RUN_ARGS ?=

IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
BIN := $(VENV)/bin
STAMP := $(VENV)/.fedbd-installed
SOURCES := fedbd clients server tests benchmarks docs
QUICKSTART := \
	scenarios/quickstart.yaml \
	scenarios/quickstart-clean.yaml \
	scenarios/quickstart-median.yaml \
	scenarios/quickstart-defended.yaml \
	scenarios/quickstart-polluted.yaml \
	scenarios/quickstart-abl.yaml

# Nothing that a demo or a test does may call home.
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export WANDB_MODE := offline
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(STAMP)  ## run the quickstart scenarios and compare them (the first time: install, about 6 GB)
	@$(BIN)/fedbd run $(QUICKSTART) --overwrite $(RUN_ARGS)

.PHONY: test
test: check  ## linters, types, import directions, then the fast tests with coverage
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow' --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

.PHONY: slow
slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

.PHONY: check
check: $(STAMP)  ## linters, types and import directions only
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(STAMP)  ## let ruff format and mend what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: docs
docs: $(STAMP)  ## write the generated parts of docs/ and its pictures anew
	$(BIN)/python docs/figures/fields.py
	$(BIN)/python docs/figures/architecture.py

.PHONY: picture
picture: $(STAMP)  ## draw docs/quickstart.png from the runs of the last `make demo`
	$(BIN)/python docs/figures/terminal.py $(foreach file,$(QUICKSTART),$(wildcard runs/$(basename $(notdir $(file)))/seed-*))

.PHONY: constraints
constraints: $(STAMP)  ## write constraints.txt from what is installed now
	@sed -n '/^#/p' constraints.txt > $(VENV)/constraints.new
	@$(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//' | LC_ALL=C sort -f >> $(VENV)/constraints.new
	@mv $(VENV)/constraints.new constraints.txt

.PHONY: install
install: $(STAMP)  ## only make the environment

.PHONY: clean
clean:  ## remove the environment, caches and builds (never runs/)
	rm -rf .venv .venv-ci build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find fedbd clients server tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

# One environment for demo and tests. The install is editable: a change to the code needs none. pip is quiet but for what
# takes long: downloads of 10 MB and more, and the unpacking.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x "$(BIN)/python" ]; then \
		python="$(PYTHON)"; \
		if ! "$${python:-python3}" -c '$(IS_311)' 2>/dev/null; then \
			found=$$("$${python:-python3}" --version 2>/dev/null || echo nothing); \
			echo "fedbd needs Python 3.11; $${python:-python3} is $$found. Install 3.11, or pass PYTHON=path" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$("$$python" --version)"; \
		if ! "$$python" -m venv "$(VENV)"; then \
			rm -rf "$(VENV)"; \
			echo "$$python cannot make virtual environments; install its venv module (Debian: python3.11-venv)" >&2; \
			exit 1; \
		fi; \
	fi
	@if ! "$(BIN)/python" -c '$(IS_311)'; then \
		echo "fedbd needs Python 3.11; $(VENV) holds $$("$(BIN)/python" --version). Remove it, or pass VENV=path" >&2; \
		exit 1; \
	fi
	@echo "Installing into $(VENV); the first time this downloads and unpacks about 6 GB, most of it torch, and takes minutes"
	@"$(BIN)/python" -m pip install -c constraints.txt -e '.[dev]' | awk ' \
		/Downloading .*([0-9][0-9]\.[0-9] MB|GB)\)/ {print "  " $$0; fflush()} \
		/^Installing collected/ {print "  unpacking"; fflush()}'
	@touch $@
