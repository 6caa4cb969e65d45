# make: the environment, then the pipeline on the embedded model.   make test: all tests.   make lint: ruff and mypy.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: all environment test lint benchmarks clean

all: environment
	@touch .venv/.started
	dvc repro
	@test metrics/evaluation.json -nt .venv/.started || python -m replaceme.evaluation.comparison
	@git diff --quiet HEAD -- dvc.lock metrics || printf '%s\n' \
		'dvc metrics diff HEAD: compares this run with the committed one, which in a fresh clone is the author'"'"'s, of another machine.' \
		'git add dvc.lock metrics && git commit -m "baseline of this machine": from then on, experiments are compared with this run.'

environment: .venv/.run

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python requirements.txt pyproject.toml
	python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.dev: .venv/.run
	python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: .venv/.dev
	pytest

lint: .venv/.dev
	ruff check .
	ruff format --check .
	mypy

benchmarks: environment
	python -m benchmarks.cost
	python -m benchmarks.memory
	python -m benchmarks.evaluation

clean:
	rm -rf .venv artifacts
