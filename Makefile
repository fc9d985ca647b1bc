# What CI runs and nothing else. Every target sets up its own virtual environment first, so each works on a fresh machine.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SHELL_SCRIPTS := .ci/run .ci/install-slurm .ci/install-chromium $(wildcard launch/*.sh launch/*.slurm)
BENCHMARKS := $(filter-out benchmarks/__init__.py,$(wildcard benchmarks/*.py)) benchmarks/gpu/__main__.py benchmarks/paper/__main__.py \
	benchmarks/rivals/setup.py benchmarks/rivals/judge.py

EXTRAS := shards,text,minilm,deepspeed,triton,slurm,sweep,onnx,ann,serve,dev

.PHONY: help setup images train test test-all lint docs bench gpu paper clean

setup: $(VENV)/installed  ## the virtual environment, with the versions of constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

images: $(VENV)/installed-images  ## adds the image encoders; README says what to mind

$(VENV)/installed-images: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS),images]'
	touch $@

train: setup  ## the demo: generate data, build its store, train, evaluate every size
	$(BIN)/python -m fmrl_dist.train --resume auto

test: setup  ## the fast tests
	$(BIN)/python -m tests.run -m "not slow and not slurm"

test-all: setup  ## every test
	$(BIN)/python -m tests.run

lint: setup  ## style, types, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

docs: setup  ## docs/config.md, from the dataclasses of fmrl_dist/config
	$(BIN)/python -m fmrl_dist.config.reference

bench:  ## what can be measured, and the command that measures it (each needs inputs of its own)
	@for script in $(BENCHMARKS); do \
		echo "$(BIN)/python -m $$(echo $${script%.py} | sed 's,/__main__,,; s,/,.,g') --help"; \
		sed -n '1s/^"""/    /; 1s/"""$$//; 1p' $$script; \
	done

paper: setup  ## the paper's table 2, ours and the rivals', hours on two cores; PAPER_ARGS=--dry-run prints the commands
	$(BIN)/python -m benchmarks.paper $(PAPER_ARGS)

gpu: setup  ## tests and measurements on an NVIDIA GPU, nine minutes; GPU_ARGS=--dry-run tries them on the CPU
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST)

clean:  ## what setup and the tools leave behind; data, stores and runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
