# The commands of this repository. Each does its own set-up: .venv, the pinned packages, the built extension.
#
#   make test PYTHON=/path/to/python       use that environment as it is instead of .venv
#   make setup BASE_PYTHON=python3.12      the interpreter that .venv is made with
#   make demo ARGS="--epochs 3"            options for the demo; make test ARGS="-k adamw" for pytest
#   make test WORKERS=8                    how many processes run the tests; 0: the calling one

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The order of a target's prerequisites is the order of its checks.
.NOTPARALLEL:

BASE_PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

# Only the command line counts: a PYTHON that happens to be in the environment is not meant for us.
ifeq ($(origin PYTHON),command line)
override PY := $(PYTHON)
PINS :=
# What another environment holds is not for us to remember: ask pip every time.
INSTALLED := install-into-python
else
override PY := .venv/bin/python
PINS := .venv/pins.stamp
INSTALLED := .venv/installed.stamp
endif

# A test compares with it. Of what it depends on, torchvision has no build for every torch; the test does without.
TIMM := timm==1.0.31

PYTEST = $(PY) -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadgroup)

CPP = $(shell find csrc tests scripts -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Warnings are errors here and nowhere else: a user's compiler may know warnings that ours does not. What a machine lacks
# for the build is said by setup.py, in one sentence, before pip starts.
define INSTALL
@export FUSED_OPTIM_EXTENSION="$${FUSED_OPTIM_EXTENSION:-ON}" && $(PY) setup.py --quiet --version >/dev/null && \
echo "building the extension into $(PY); a minute or two" && \
CXXFLAGS="-Werror $$CXXFLAGS" $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
endef

.PHONY: help setup demo check test test-slow lint types docs format wheel clean install-into-python

help:
	@echo "make demo       train a small vision transformer with torch's AdamW and with this one, and compare"
	@echo "make check      after each change: formatters, linters, types, build, an example of each test; under a minute"
	@echo "make test       formatters, linters, types, build, docs, tests: what CI runs"
	@echo "make test-slow  the tests that take too long for 'make test'"
	@echo "make wheel      build the sdist and a wheel for each CPython at hand in dist/, and take a step with this one's"
	@echo "make docs       build docs/_build/html; warnings are errors"
	@echo "make setup      only the set-up: .venv, pinned packages, the extension"
	@echo "make format     let ruff and clang-format rewrite the sources"
	@echo "make clean      remove what was built, but not .venv"

# The demo and the build need little of what development needs: without linters, docs and frameworks.
.venv/demo.stamp: $(wildcard requirements/*.txt)
	@command -v $(BASE_PYTHON) >/dev/null || { echo "fused_optim needs Python 3.10 or newer, and there is no $(BASE_PYTHON); apt install python3 (Debian, Ubuntu), or make BASE_PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BASE_PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("fused_optim needs Python 3.10 or newer, and $(BASE_PYTHON) is %d.%d; choose another: make BASE_PYTHON=/path/to/python3" % v[:2])'
	@test -x .venv/bin/python || $(BASE_PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(BASE_PYTHON) cannot make a virtual environment; apt install python3-venv (Debian, Ubuntu)" >&2; exit 1; }
	@test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "installing torch and what the demo needs into .venv; where there is no GPU, PIP_EXTRA_INDEX_URL may name an index of torch builds without CUDA, which are smaller"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/demo.txt
	@touch $@

.venv/pins.stamp: .venv/demo.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TIMM)
	@touch $@

# Folders are among the prerequisites, so that a source which is added or removed counts too.
.venv/installed.stamp: .venv/demo.stamp pyproject.toml setup.py CMakeLists.txt $(shell find csrc)
	$(INSTALL)
	@touch $@

install-into-python:
	$(INSTALL)

setup: $(PINS) $(INSTALLED)

demo: $(INSTALLED)
# On a machine that does other work too, threads that wait by spinning take the processors from those that they wait for.
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(PY) examples/train_digits.py $(ARGS)

lint: $(PINS)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@test $(words $(CPP)) -ge 64 || { echo "clang-format is given $(words $(CPP)) files, and there are 64 or more" >&2; exit 1; }
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CPP)

types: $(PINS)
	$(PY) -m mypy

docs: $(PINS) $(INSTALLED)
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html

check: lint types $(INSTALLED)
	$(PYTEST) -m check $(ARGS)

# pytest comes last, so that its closing line is the last one.
test: lint types $(INSTALLED) docs
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: $(PINS) $(INSTALLED)
	$(PYTEST) -m slow $(ARGS)

# A wheel for each CPython at hand, from the sdist, which is thereby proved complete. The one for this interpreter takes
# a step in a fresh environment.
wheel: $(PINS)
	rm -rf dist
	$(PY) scripts/build_wheels.py $(ARGS)
	$(PY) scripts/check_wheel.py dist/*.whl

format: $(PINS)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(PY) -c 'import clang_format; clang_format.clang_format()' -i $(CPP)

clean:
	rm -rf build dist docs/_build *.egg-info .venv/installed.stamp
	rm -f fused_optim/*.so
	find fused_optim kernels bench tests examples scripts -name __pycache__ -exec rm -rf {} +
