# make demo   install, train on a generated log, print where the report is
# make test   the same environment with test extras, then the suite
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types benchmark clean

help:
	@sed -n 's/^# make/make/p' Makefile

# Stamps: an environment is made once, and again when what it depends on changes.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Installing compiles the kernels for CPUs, where there is a compiler.
$(VENV)/.core: $(VENV)/.created pyproject.toml constraints.txt hatch_build.py $(wildcard recclr/cpp/*.cpp recclr/cpp/*.h)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core requirements-torchrec.txt
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps --requirement requirements-torchrec.txt
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --editable '.[test,dev]'
	touch $@

demo: $(VENV)/.core
	rm -rf $(DEMO)
	$(VENV)/bin/recclr demo --out $(DEMO)

# Several processes share the tests (make test WORKERS=0: one). Threads that wait for work leave
# their core to the others; by default OpenMP's spin, which doubles what tests take side by side.
WORKERS ?= auto

test: $(VENV)/.test
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -m "not slow" \
		--numprocesses $(WORKERS) --dist worksteal

# make slow   the tests that take longer than a few seconds
slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

# make lint   ruff, both as linter and as formatter
lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# make types   mypy, strict
types: $(VENV)/.dev
	$(VENV)/bin/mypy

# make benchmark   speed on this machine, against the floors of its own matrix product
benchmark: $(VENV)/.core
	$(VENV)/bin/python pipelines/benchmark.py

# make clean   the environment and the demo run
clean:
	rm -rf $(VENV) $(DEMO)
