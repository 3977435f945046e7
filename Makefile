# `make demo` and `make test` each work alone on a machine that has Python 3.11 or newer and make.
#
#   make demo    the whole pipeline on a simulator, about 10 minutes on two CPU cores; report in runs/demo/report.html
#   make test    the quick tests
#   make lint types wheel clean
#
# Variables: PYTHON (which interpreter makes the environment), VENV (where), EXTRAS, PIP_FLAGS, DEMO_FLAGS, PYTEST_FLAGS,
# TEST_PROCESSES (how many the test files are dealt to; 0: one after another in this one).

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: help demo test lint types wheel clean setup

VENV ?= .venv
EXTRAS ?= dev,metaworld,bnb
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
TEST_PROCESSES ?= 2
PIP_FLAGS ?=
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
OFFSCREEN = $(VENV)/.mujoco_gl
GL_PACKAGES = libegl1 libegl-mesa0 libgl1-mesa-dri libgl1

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: setup
	MUJOCO_GL=$${MUJOCO_GL:-$$(cat $(OFFSCREEN))} $(BIN)/vla demo $(DEMO_FLAGS)

test: setup
	MUJOCO_GL=$${MUJOCO_GL:-$$(cat $(OFFSCREEN))} $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(INSTALLED)
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

setup: $(INSTALLED) $(OFFSCREEN)

# Shell fragment: install the Debian packages named in $$packages if this user may, else fail.
define apt_install
as_root=""; \
if [ "$$(id -u)" != 0 ]; then as_root="sudo -n"; fi; \
if command -v apt-get >/dev/null 2>&1 && $$as_root true >/dev/null 2>&1; then \
	echo "== installing Debian packages: $$packages"; \
	$$as_root apt-get update -qq && $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages; \
else false; fi
endef

# One pip command for everything: a second one could replace torch by the newest there is.
$(INSTALLED): pyproject.toml
	@python=""; \
	for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		if [ -n "$(PYTHON)" ]; then break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: $(if $(PYTHON),$(PYTHON) is not Python 3.11 or newer,found no Python 3.11 or newer on the PATH); fix: install Python 3.11+, or make PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	if ! $$python -c 'import venv, ensurepip' >/dev/null 2>&1; then \
		packages=python3-venv; \
		{ $(apt_install); } || { echo "error: $$python cannot make virtual environments; fix: sudo apt-get install -y python3-venv" >&2; exit 2; }; \
	fi; \
	echo "== making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)
	@echo "== installing the toolkit with [$(EXTRAS)] (about 2 GB with a CPU build of torch, more with CUDA; minutes)"
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[$(EXTRAS)]'
	@touch $@

# Holds the value of MUJOCO_GL that draws here.
$(OFFSCREEN): $(INSTALLED)
	@echo "== looking for off-screen OpenGL"
	@if $(BIN)/python -m vla.eval.offscreen_check > $@.tmp 2> $@.log; then mv $@.tmp $@; exit 0; fi; \
	packages="$(GL_PACKAGES)"; \
	{ $(apt_install); } || { cat $@.log >&2; echo "error: no off-screen OpenGL, and it could not be installed from here; fix: sudo apt-get install -y $(GL_PACKAGES)" >&2; exit 2; }; \
	$(BIN)/python -m vla.eval.offscreen_check > $@.tmp && mv $@.tmp $@
