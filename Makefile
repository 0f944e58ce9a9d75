# On a fresh machine `make train` sets itself up, runs whatever stages are missing, and ends in a report.

EXP ?= bon_helpful
ARGS ?=
EXTRA ?=
PYTHON ?= python3 python3.13 python3.12 python3.11

COMMA := ,
REQUIREMENTS := .[dev$(if $(EXTRA),$(COMMA)$(EXTRA))]
BIN := .venv/bin
JOB := $(BIN)/python -m ctrl_jax
# Written last, so that an interrupted installation is not taken for a complete one.
STAMP := .venv/.installed$(if $(EXTRA),-$(EXTRA))
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup train sft reward-model calibrate evaluate export report sample replay sweep plan profile ideal test test-slow \
	chaos check bench bench-kl clean

help: ## this list
	@echo 'make TARGET [EXP=bon_helpful] [ARGS="--policy.kl-budget 0.5"] [PYTHON=python3.12] [EXTRA=cuda12]'
	@echo 'EXP names a file of experiments/; without it, bon_helpful. ARGS goes to the command as it stands.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install into it, once; EXTRA=cuda12 or EXTRA=tpu for an accelerator, EXTRA=wandb

$(STAMP): setup.cfg pyproject.toml
	@if ! $(BIN)/python -c '$(RECENT)' 2>/dev/null; then \
		for python in $(PYTHON) ''; do "$$python" -c '$(RECENT)' 2>/dev/null && break; done; \
		if [ -z "$$python" ]; then \
			echo 'ctrl_jax needs Python 3.11 or newer, and none of "$(PYTHON)" is.' >&2; \
			echo 'Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; exit 1; \
		fi; \
		rm -rf .venv; \
		if command -v uv >/dev/null; then uv venv --quiet --python "$$python" .venv; else "$$python" -m venv .venv; fi; \
	fi
	@echo 'Installing into .venv, about a minute ...'
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '$(REQUIREMENTS)'; \
	else \
		$(BIN)/python -m ensurepip >/dev/null && $(BIN)/python -m pip install --quiet -e '$(REQUIREMENTS)'; \
	fi
	@touch .venv/.installed $@

train: $(STAMP) ## run whatever stages are missing, train the policy, evaluate, report: the whole path
	$(JOB) train $(EXP) $(ARGS)

sft: $(STAMP) ## only the reference policy, by fine-tuning on the dialogues
	$(JOB) sft $(EXP) $(ARGS)

reward-model: $(STAMP) ## only the reward model, from preference pairs
	$(JOB) reward-model $(EXP) $(ARGS)

calibrate: $(STAMP) ## only the calibration table: rewards of the reference policy's responses
	$(JOB) calibrate $(EXP) $(ARGS)

evaluate: $(STAMP) ## win rates and KL of the trained policy, with intervals
	$(JOB) evaluate $(EXP) $(ARGS)

export: $(STAMP) ## write the policy as a Hugging Face directory; ARGS="--format adapter" for the adapter alone
	$(JOB) export $(EXP) $(ARGS)

report: $(STAMP) ## write report/index.html anew
	$(JOB) report $(EXP) $(ARGS)

sample: $(STAMP) ## a local page to ask policy and reference something; ARGS=--terminal prints a table
	$(JOB) sample $(EXP) $(ARGS)

replay: $(STAMP) ## take the step again at which a training stopped as not finite, and tell what went wrong
	$(JOB) replay $(EXP) $(ARGS)

sweep: $(STAMP) ## every point of the experiment's sweep(), ending in the Pareto figure; ARGS="--jobs 4"
	$(JOB) sweep $(EXP) $(ARGS)

plan: $(STAMP) ## time and memory by phase on any devices; ARGS="--devices 8 --device-kind v5e"
	$(JOB) plan $(EXP) $(ARGS)

profile: $(STAMP) ## a trace of a few policy steps, and where their time went; ARGS="--steps 3"
	$(JOB) profile $(EXP) $(ARGS)

ideal: $(STAMP) ## the theory alone: ARGS="--procedure best_of_4 --kl 1.0"
	$(JOB) ideal $(ARGS)

test: $(STAMP) ## the fast tests; ARGS="-x tests/theory" goes to pytest
	$(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes: whole runs, kills and resumes
	$(BIN)/python -m pytest -q -m slow $(ARGS)

chaos: $(STAMP) ## 25 kills over a whole pipeline, which must end bit-identical to one left alone; minutes
	$(BIN)/python -m tests.chaos $(ARGS)

check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: ## speed and memory beside transformers, TRL and tunix; wants a quiet machine and 20 minutes
	@$(MAKE) --no-print-directory setup EXTRA=bench
	$(BIN)/python -m benchmarks.bench $(ARGS)

bench-kl: $(STAMP) ## the gradient's variance with the KL exact or sampled, at bon_helpful's policy (trained if need be)
	$(BIN)/python -m benchmarks.kl_gradient $(ARGS)

clean: ## remove caches and build leftovers; runs/ and .venv/ stay
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
