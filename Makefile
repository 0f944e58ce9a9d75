# On a fresh machine `make train` sets itself up, runs whatever stages are missing, and ends in a report.

EXP ?= bon_helpful
ARGS ?=
EXTRA ?=
VERSIONS ?= newest
PYTHON ?= python3 python3.13 python3.12 python3.11

COMMA := ,
REQUIREMENTS := .[dev$(if $(EXTRA),$(COMMA)$(EXTRA))]
BIN := .venv/bin
JOB := $(BIN)/python -m ctrl_jax
# EXP and ARGS reach the command as they stand: in the environment, where neither make nor the shell sees a $ or a
# bracket of theirs, and split by Python, where quotes group. The command is printed whole, to be copied.
export MAKE_EXP := $(value EXP)
export MAKE_ARGS := $(value ARGS)
unexport EXP ARGS
define WITH_ARGS
import os, shlex, sys
try:
    command = sys.argv[1:] + shlex.split(os.environ.pop("MAKE_ARGS"))
except ValueError as error:
    sys.exit(f"error: ARGS cannot be read: {error}. It is a line of options, such as ARGS='--prompt \"What is 2 + 2?\"'.")
sys.stdout.reconfigure(errors="backslashreplace")
print(shlex.join(command), flush=True)
os.execvp(command[0], command)
endef
export WITH_ARGS
RUN := @$(BIN)/python -c "$$WITH_ARGS"
# Written last, so that an interrupted installation is not taken for a complete one.
STAMP := .venv/.installed$(if $(EXTRA),-$(EXTRA))$(if $(filter-out newest,$(VERSIONS)),-$(VERSIONS))
# Of what is installed: the newest that setup.cfg allows, the oldest, or those of requirements.lock.
ifeq ($(filter newest oldest locked,$(VERSIONS)),)
$(error VERSIONS is $(VERSIONS); it is newest, oldest or locked)
endif
LOCKED := $(if $(filter locked,$(VERSIONS)),-c requirements.lock)
OLDEST := $(if $(filter oldest,$(VERSIONS)),--resolution lowest-direct)
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

TARGETS := help setup train sft reward-model calibrate evaluate export report sample replay runs compare judge choose-n decode sweep plan \
	profile ideal explore \
	test test-slow mutants chaos check docs wheel lock bench bench-kl clean
.DEFAULT_GOAL := help
.PHONY: $(TARGETS)

# Before anything runs: `make train baseline_identity` would train for minutes first.
UNKNOWN := $(filter-out $(TARGETS) $(STAMP),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
$(error $(firstword $(UNKNOWN)) is no target, and nothing was run. An experiment or a run is named by EXP: \
	make $(firstword $(filter $(TARGETS),$(MAKECMDGOALS)) train) EXP=$(firstword $(UNKNOWN)). `make` lists the targets)
endif

help: ## this list
	@echo 'make TARGET [EXP=bon_helpful] [ARGS="--policy.kl-budget 0.5"] [PYTHON=python3.12] [EXTRA=cuda12]'
	@echo 'EXP names a file of experiments/, by default bon_helpful, or the folder of a run, such as runs/bon_helpful.'
	@echo 'ARGS goes to the command as it stands; quotes group: ARGS='\''--prompt "What costs $$5?"'\''.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install into it, once; EXTRA=cuda12 or EXTRA=tpu for an accelerator; VERSIONS=locked

$(STAMP): setup.cfg pyproject.toml $(if $(filter locked,$(VERSIONS)),requirements.lock)
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
		uv pip install --quiet --compile-bytecode --python $(BIN)/python $(OLDEST) $(LOCKED) -e '$(REQUIREMENTS)'; \
	elif [ -n '$(OLDEST)' ]; then \
		echo 'VERSIONS=oldest needs uv, which finds them: pip install uv' >&2; exit 1; \
	else \
		$(BIN)/python -m ensurepip >/dev/null && $(BIN)/python -m pip install --quiet $(LOCKED) -e '$(REQUIREMENTS)'; \
	fi
	@touch .venv/.installed $@

train: $(STAMP) ## run whatever stages are missing, train the policy, evaluate, report: the whole path
	$(RUN) $(JOB) train "$$MAKE_EXP"

sft: $(STAMP) ## only the reference policy, by fine-tuning on the dialogues
	$(RUN) $(JOB) sft "$$MAKE_EXP"

reward-model: $(STAMP) ## only the reward model, from preference pairs
	$(RUN) $(JOB) reward-model "$$MAKE_EXP"

calibrate: $(STAMP) ## only the calibration table: rewards of the reference policy's responses
	$(RUN) $(JOB) calibrate "$$MAKE_EXP"

evaluate: $(STAMP) ## win rates and KL of the trained policy, with intervals
	$(RUN) $(JOB) evaluate "$$MAKE_EXP"

export: $(STAMP) ## write the policy as a Hugging Face directory; ARGS="--format adapter" or "--format reward"
	$(RUN) $(JOB) export "$$MAKE_EXP"

report: $(STAMP) ## write report/index.html anew
	$(RUN) $(JOB) report "$$MAKE_EXP"

sample: $(STAMP) ## a local page to ask policy and reference something; ARGS=--terminal prints a table
	$(RUN) $(JOB) sample "$$MAKE_EXP"

replay: $(STAMP) ## take the step again at which a training stopped as not finite, and show what went wrong
	$(RUN) $(JOB) replay "$$MAKE_EXP"

runs: $(STAMP) ## the runs below runs/, with their state and main numbers
	$(RUN) $(JOB) runs

compare: $(STAMP) ## two finished runs on the same prompts: EXP=runs/a ARGS=runs/b
	$(RUN) $(JOB) compare "$$MAKE_EXP"

judge: $(STAMP) ## responses that any engine sampled and scored: EXP=policy.jsonl ARGS=reference.jsonl
	$(RUN) $(JOB) judge "$$MAKE_EXP"

choose-n: $(STAMP) ## what best-of-N wins over N, and what N responses risk: EXP=policy.jsonl ARGS=reference.jsonl
	$(RUN) $(JOB) choose-n "$$MAKE_EXP"

decode: $(STAMP) ## the policy under best-of-N and tree search: win rates, tokens, what to train for; ARGS="--decoders ..."
	$(RUN) $(JOB) decode "$$MAKE_EXP"

sweep: $(STAMP) ## every point of the experiment's sweep(), ending in the Pareto figure; ARGS="--jobs 4"
	$(RUN) $(JOB) sweep "$$MAKE_EXP"

plan: $(STAMP) ## time and memory by phase on any devices; ARGS="--devices 8 --device-kind v5e"
	$(RUN) $(JOB) plan "$$MAKE_EXP"

profile: $(STAMP) ## a trace of a few policy steps, and where their time went; ARGS="--steps 3"
	$(RUN) $(JOB) profile "$$MAKE_EXP"

ideal: $(STAMP) ## the theory alone: ARGS="--procedure best_of_4 --kl 1.0"
	$(RUN) $(JOB) ideal

explore: $(STAMP) ## the theory in a page, with sliders for procedure, N, KL and transform
	$(RUN) $(JOB) explore

test: $(STAMP) ## the fast tests; ARGS="-x tests/theory" goes to pytest
	$(RUN) $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile

test-slow: $(STAMP) ## the tests that take minutes: whole runs, kills and resumes
	$(RUN) $(BIN)/python -m pytest -q -m slow

mutants: $(STAMP) ## one-line faults, each made in a copy of the tree, where tests must fail; 20 minutes; ARGS="interval"
	$(RUN) $(BIN)/python -m tests.mutants

chaos: $(STAMP) ## 25 kills over a whole pipeline, which must end bit-identical to one left alone; minutes
	$(RUN) $(BIN)/python -m tests.chaos

check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: ## the pages and a reference as a site, in site/index.html; warnings are errors
	@$(MAKE) --no-print-directory setup EXTRA=docs
	$(RUN) $(BIN)/python -m sphinx -q -W -b html -d .cache/docs docs site

wheel: $(STAMP) ## the package, built into dist/
	@rm -rf build dist
	$(RUN) $(BIN)/python -m build --outdir dist

lock: ## requirements.lock anew: the newest versions of everything that development needs; needs uv
	@uv pip compile setup.cfg --extra dev --universal --python-version 3.11 --no-emit-index-url --upgrade --quiet \
		--custom-compile-command 'make lock' --output-file requirements.lock

bench: ## speed and memory beside transformers, TRL and tunix; wants a quiet machine and half an hour
	@$(MAKE) --no-print-directory setup EXTRA=bench
	$(RUN) $(BIN)/python -m benchmarks.bench

bench-kl: $(STAMP) ## the gradient's variance with the KL exact or sampled, at bon_helpful's policy (trained if need be)
	$(RUN) $(BIN)/python -m benchmarks.kl_gradient

clean: ## remove caches and build leftovers; runs/ and .venv/ stay
	rm -rf .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
