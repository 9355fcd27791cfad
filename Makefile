# Every target does all its own set-up: in a clean clone, `make demo` and `make test` are the only commands needed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/.peers-installed
TASK ?= add
ENGINE ?= auto
ARGS ?=

# SGLang brings its own torch and transformers: its rollout server lives in an environment of its own. This one runs
# it on a CPU (tests/sglang_cpu/README.md); SGLANG_PYTHON names another one that has it, on a GPU host for example.
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_RECIPE := tests/sglang_cpu
SGLANG_PYTHON ?= $(SGLANG_VENV)/bin/python
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
GPU_PYTHON ?= $(GPU_VENV)/bin/python
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input

.PHONY: install sglang demo test test-gpu prove bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[server-cpu,learner,optim,peft,rewards,demo,dev]'
	@touch $@

sglang: $(SGLANG_STAMP)

# torch with what it needs, everything else without: what SGLang asks for and a CPU cannot use would be gigabytes.
$(SGLANG_STAMP): pyproject.toml $(SGLANG_RECIPE)/requirements.txt
	@echo "installing SGLang for a CPU into $(SGLANG_VENV) (a few minutes the first time) ..."
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python $(PIP_INSTALL) -c $(SGLANG_RECIPE)/requirements.txt torch
	@$(SGLANG_VENV)/bin/python $(PIP_INSTALL) --no-deps --no-warn-conflicts -r $(SGLANG_RECIPE)/requirements.txt -e .
	@$(SGLANG_VENV)/bin/python $(SGLANG_RECIPE)/enable.py
	@touch $@

# TASK=add: a real language model of 135M parameters. TASK=sort: a tiny one, no download. ENGINE=sglang: rollouts from
# SGLang. ARGS: flags of the command.
ifeq ($(ENGINE),sglang)
DEMO_SERVER := --server-python $(SGLANG_PYTHON)
DEMO_NEEDS := $(if $(filter $(SGLANG_VENV)/%,$(SGLANG_PYTHON)),$(SGLANG_STAMP))
endif
demo: $(STAMP) $(DEMO_NEEDS)
	@$(VENV)/bin/headway-learner demo --task $(TASK) --engine $(ENGINE) $(DEMO_SERVER) $(ARGS)

test: $(STAMP) $(SGLANG_STAMP)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.check $(ARGS)

$(GPU_STAMP): pyproject.toml
	@echo "installing SGLang and the tests into $(GPU_VENV) (gigabytes the first time) ..."
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python $(PIP_INSTALL) -e '.[server,dev]'
	@touch $@

# Needs a GPU; tests/gpu/README.md says which variables it reads. GPU_PYTHON: another environment that has SGLang.
test-gpu: $(if $(filter $(GPU_VENV)/%,$(GPU_PYTHON)),$(GPU_STAMP)) \
		$(if $(filter $(SGLANG_VENV)/%,$(GPU_PYTHON)),$(SGLANG_STAMP))
	@$(GPU_PYTHON) -m pytest tests/gpu -m gpu -s $(ARGS)

# The staleness bound on ten million groups: minutes on two cores. ARGS='--groups 500000' for a look.
prove: $(STAMP)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.prove $(ARGS)

# Other learners to compare with. Without them (no network) their rows are skipped, and say so.
$(PEERS_STAMP): $(STAMP)
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[peers]' && touch $@ || echo "no peers to compare with"

bench: $(STAMP) $(PEERS_STAMP)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.bench $(ARGS)

# Runs are results, not products of the build: they stay.
clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(GPU_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
