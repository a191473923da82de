# `make train` and `make test` need nothing but a Python >= 3.12 (.ci/find_python says where it is looked for).

# The accelerator decides what is installed. Commands run on it, or on the CPU; set JAX_PLATFORMS to choose.
NVIDIA := $(shell nvidia-smi --list-gpus 2>/dev/null | grep '^GPU')
TPU := $(wildcard /dev/accel[0-9]* /dev/vfio/[0-9]*)
ifneq ($(NVIDIA),)
  ACCELERATOR := cuda
else ifneq ($(TPU),)
  ACCELERATOR := tpu
endif
export PYTHON

RUN := exec .venv/bin/python -m

.PHONY: help train r1 serve bench test test-slow test-card lint types format docs environment serve-environment test-environment docs-environment

help:
	@echo "make train      train configs/tiny.py on real text into runs/tiny; the same command continues an interrupted run"
	@echo "make r1         from random weights to a model that reasons, in R1's stages, into runs/r1; the same command continues"
	@echo "make serve      serve the model of make train to clients of OpenAI's API, with a page to talk to it"
	@echo "make bench      measure the training step of configs/tiny.py"
	@echo "make test       run the tests on a simulated mesh of 8 CPU devices"
	@echo "make test-slow  run the tests that take longer than about 20 seconds each"
	@echo "make test-card  run the tests of the kernels that need a Hopper GPU, on it"
	@echo "make lint       check style, format and types; make format: repair what can be repaired"
	@echo "make types      check types, and take mended findings out of the baseline"
	@echo "make docs       build the documentation as a site into site/"

train: environment
	@$(RUN) experiments.train --config=configs/tiny.py --workdir=runs/tiny

r1: environment
	@$(RUN) experiments.r1 --workdir=runs/r1

serve: serve-environment
	@test -e runs/tiny/checkpoints || { echo "runs/tiny has no trained model yet: run make train first"; exit 2; }
	@$(RUN) experiments.serve --workdir=runs/tiny

bench: environment
	@$(RUN) experiments.benchmarks.training_step --config=configs/tiny.py

test test-slow: export JAX_PLATFORMS := cpu

# A fault for which many tests wait as long as they can ends in time for a summary.
test: test-environment
	@$(RUN) pytest --maxfail=20

test-slow: test-environment
	@$(RUN) pytest -m slow

# tests/conftest.py simulates eight CPU devices; what is below the folder named here starts on the GPU.
test-card: environment test-environment
	@$(RUN) pytest -n=0 -rs --confcutdir=tests/pallas_kernels tests/pallas_kernels/*/test_on_card.py

lint: test-environment
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.ci/types

types: test-environment
	.ci/types

format: test-environment
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

docs: docs-environment
	@$(RUN) docs.make_site

environment:
	@.ci/environment data $(ACCELERATOR)

serve-environment:
	@.ci/environment data serve $(ACCELERATOR)

test-environment:
	@.ci/environment data serve dev docs

docs-environment:
	@.ci/environment docs
