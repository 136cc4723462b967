# `make demo` and `make test` are all a fresh machine needs: Python 3.10 or newer with venv, and make.

PYTHON ?= python3
EXTRAS ?= dali,dev
# The file of pinned versions. Each has an environment of its own: constraints-gpu.txt has .venv-gpu.
CONSTRAINTS ?= constraints.txt

VENV := $(subst .venv-constraints,.venv,.venv-$(basename $(notdir $(CONSTRAINTS))))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.set-up-for
# What the stamp holds: a change in any of it means that the set-up is out of date. Contents, because a fresh clone's
# file times say nothing.
WANTED = { cat pyproject.toml "$(CONSTRAINTS)"; echo "$(EXTRAS)"; pwd; } | cksum

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow lint types docs clean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: ## create or update .venv (nothing to do when it is up to date)
	@fail() { echo "make: $$1" >&2; exit 1; }; \
	[ -f "$(CONSTRAINTS)" ] || fail "CONSTRAINTS=$(CONSTRAINTS) is no file; name one, such as constraints-gpu.txt"; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" = "$$($(WANTED))" ] && [ -x $(PY) ]; then exit 0; fi; \
	set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  command -v "$(PYTHON)" >/dev/null 2>&1 \
	    || fail "$(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=python3.11 ..."; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	    || fail "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), older than 3.10; name a newer one: make PYTHON=python3.11 ..."; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	    || fail "$(PYTHON) lacks venv or ensurepip; install it (Debian, Ubuntu: apt-get install python3-venv)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); \
	fi; \
	echo "setting up $(VENV) (the first time this downloads several gigabytes)"; \
	rm -f $(STAMP); \
	$(PY) -m pip install --quiet -c "$(CONSTRAINTS)" setuptools; \
	$(PY) -m pip install -c "$(CONSTRAINTS)" --no-build-isolation -e ".[$(EXTRAS)]"; \
	$(WANTED) > $(STAMP).new; mv $(STAMP).new $(STAMP)

demo: setup ## draw, pack, train and score on the CPU; IMAGES=/some/folder takes your own images
	@$(PY) -m dino_fast.demo $(if $(IMAGES),--images "$$IMAGES")

# Many tests wait for a process or a moment: on two cores, two at a time keep them busy for 60 % of the time.
test: setup ## the tests that take seconds; CONSTRAINTS=constraints-gpu.txt: with the versions of the GPU machine
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist worksteal

slow: setup ## the tests that take minutes
	@$(PY) -m pytest -m slow

lint: setup ## ruff: rules and format
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

types: setup ## mypy
	@$(PY) -m mypy

docs: setup ## write the generated pages, and build the documentation into site/
	@$(PY) -c "import material" 2>/dev/null \
	  || $(PY) -m pip install --quiet -c "$(CONSTRAINTS)" --no-build-isolation -e ".[$(EXTRAS),docs]"
	@$(PY) -m docs.generate
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict -f - < docs/mkdocs.yml

clean: ## remove caches only: never .venv, shards or outputs
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	@find $(wildcard shards pipelines dino_fast bench tests) -type d -name __pycache__ -prune -exec rm -rf {} +

# IMAGES reaches the recipe through the environment, so that spaces, quotes and dollar signs in it stay as they are.
export IMAGES
