# Every target does all its own set-up: in a clean clone, `make demo` and `make test` are the only commands needed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TASK ?= add
ARGS ?=

.PHONY: install demo test bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[server,learner,rewards,demo,dev]'
	@touch $@

# TASK=add: a real language model of 135M parameters. TASK=sort: a tiny one, no download. ARGS: flags of the command.
demo: $(STAMP)
	@$(VENV)/bin/headway-learner demo --task $(TASK) $(ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.check $(ARGS)

bench: $(STAMP)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.bench $(ARGS)

# Runs are results, not products of the build: they stay.
clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
