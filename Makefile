# The commands of the project. `make demo` and `make test` set everything up by themselves.
#
# An active virtual or conda environment is used as it is; without one, .venv is made.
SHELL := /bin/bash

ifneq ($(or $(VIRTUAL_ENV),$(CONDA_PREFIX)),)
PYTHON := $(shell command -v python3)
else
PYTHON := $(CURDIR)/.venv/bin/python
endif
PIP := $(PYTHON) -m pip --disable-pip-version-check
# One stamp an environment, so that another environment is set up anew.
STAMP := build/setup-$(shell echo $(PYTHON) | cksum | cut -d' ' -f1).stamp
PYTEST := $(PYTHON) -m pytest
WORKERS ?= 2
STAGE ?= all

.PHONY: help demo test test-all build build-simt check bench device abi-check format clean mutate

help:
	@echo "make demo       set up, build, train a small LLaMA, generate, compare, plot (out/)"
	@echo "make test       set up, build, run the tests     make test-all   the exhaustive grids too"
	@echo "make build      build what changed               make check      lint, types, budgets, Triton AOT"
	@echo "make bench      benchmarks -> bench/results/     make device     the stages for a GPU machine"
	@echo "make abi-check  load the binary under the oldest and newest torch"
	@echo "make mutate FAMILY=norm   mutation testing       make format     clang-format and ruff"

$(STAMP): pyproject.toml constraints.txt constraints-torch.txt
	@mkdir -p build
	@test -x $(PYTHON) || python3 -m venv .venv
	$(PIP) install --quiet --upgrade pip
	$(PYTHON) tools/has_torch.py || $(PIP) install --quiet -c constraints-torch.txt torch
	$(PIP) install --quiet -c constraints.txt "setuptools>=77" ninja pybind11
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

build: $(STAMP)
	$(PYTHON) setup.py --quiet build_ext --inplace

demo: build
	$(PYTHON) -m warploom demo --output out

test: build
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -rs --durations=10

test-all: build
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -rs -m "slow or not slow"

check: build
	$(PYTHON) tools/check.py

bench: build
	$(PYTHON) -m bench

abi-check: build
	$(PYTHON) tools/abi_check.py

mutate: build
	$(PYTHON) tools/mutate.py $(FAMILY)

# On a machine with a GPU: no environment is made, nothing is downloaded, the build is in place.
device:
	python3 tools/device.py $(STAGE)

format:
	git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cu' 'csrc/*.cpp' 'csrc/*.c' \
	  'tests/*.cu' 'tests/*.cpp' | xargs $(dir $(PYTHON))clang-format -i
	$(PYTHON) -m ruff check --fix --quiet .
	$(PYTHON) -m ruff format --quiet .

clean:
	rm -rf build out python/warploom/*.so
