# make: the environment, then the pipeline on the embedded model.   make test: all tests.   make lint: ruff and mypy.
# make test-device: what a GPU computes, on two pretended ones; needs a C++ compiler.
# make test-transformers4: exported models, read by transformers 4.57.
# make docs: the site, in site/.   make package: the wheel, installed elsewhere.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: all environment test test-device test-transformers4 lint docs package benchmarks clean

all: environment
	dvc repro
	@git diff --quiet HEAD -- dvc.lock metrics || printf '%s\n' \
		'dvc metrics diff HEAD: compares this run with the committed one, which in a fresh clone is the author'"'"'s, of another machine.' \
		'git add dvc.lock metrics && git commit -m "baseline of this machine": from then on, experiments are compared with this run.'

environment: .venv/.run

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Compiling all modules takes a third of an installation, and a run loads a tenth of them: it compiles these when it loads them.
.venv/.run: .venv/bin/python requirements.txt pyproject.toml
	python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[pipeline,4bit]'
	@touch $@

.venv/.dev: .venv/.run
	python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[pipeline,4bit,dev]'
	@touch $@

# One process for each core; the tests of a file stay together, and share what they make. A hundred short processes load the
# library: they keep its bytecode, also where the environment says not to. A thread that waits for another one sleeps.
test test-device test-transformers4: export PYTHONDONTWRITEBYTECODE =
test test-device: export OMP_WAIT_POLICY = passive

test: .venv/.dev
	pytest -n logical --dist loadfile --no-loadscope-reorder

# A run of its own: with the pretended GPUs, no test would compute on the processor unless it says so.
test-device: .venv/.dev
	pytest tests/device -n logical --dist loadgroup

.venv/.transformers4: .venv/.dev
	python -m pip install --quiet --disable-pip-version-check --no-compile --no-warn-conflicts --upgrade --target .venv/transformers4 'transformers==4.57.*'
	@touch $@

test-transformers4: .venv/.transformers4
	pytest tests/transformers4

lint: .venv/.dev
	ruff check .
	ruff format --check .
	mypy

.venv/.docs: .venv/.run
	python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[pipeline,4bit,docs]'
	@touch $@

docs: .venv/.docs
	zensical build --strict --clean

# Other packages are those of .venv: what is tried is what the wheel holds.
package: .venv/.run
	rm -rf build
	python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps build/wheel/*.whl
	@packages="$$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && cd build/wheel \
		&& export PYTHONPATH="$$packages" && venv/bin/replaceme --version && venv/bin/replaceme prune --help > help.txt \
		&& venv/bin/python -c 'import replaceme.report.page as page; page._TEMPLATES.get_template("page.html")'

benchmarks: environment
	python -m benchmarks.cost
	python -m benchmarks.memory
	python -m benchmarks.evaluation

clean:
	rm -rf .venv artifacts build site
