# `make demo` and `make test` work from a bare Debian machine with Python 3.10 or later: scripts/bootstrap.sh installs what is missing
# into .venv once, and stamps it; a second call starts at once.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-oldest test-newest rehearse faults lint docs fuzz lock licences clean distclean

BIN := .venv/bin
# More workers than this wait for memory, not for cores: each one imports torch.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
PYTEST ?= -q -n $(WORKERS) --dist worksteal
DEMO ?=
FAULTS ?=
REHEARSE ?=
SEED ?=
MINUTES ?= 5

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.ready-demo  ## distil a small vision MLP on this machine, 3 minutes; options: DEMO='--json'
	$(BIN)/std-fast demo $(DEMO)

test: .venv/.ready-test  ## the full test suite; options: PYTEST='-x -k order'
	$(BIN)/python -m pytest $(PYTEST)

test-oldest: .venv-oldest/.ready-oldest  ## the suite against the oldest torch of pyproject.toml, in an environment of its own
	.venv-oldest/bin/python -m pytest $(PYTEST)

test-newest: .venv-newest/.ready-newest  ## the suite against the newest torch there is, in an environment of its own
	.venv-newest/bin/python -m pytest $(PYTEST)

rehearse: .venv/.ready-test  ## the GPU's code under a fake GPU, where that tool is beside the project; options: REHEARSE='--ways values'
	$(BIN)/python -m tests.rehearsal $(REHEARSE)

faults: .venv/.ready-test  ## the fault campaign: kills, full disks, damaged files, ... with a table; options: FAULTS='--only disk' SEED=1
	$(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED)) $(FAULTS)

lint: .venv/.ready-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/.ready-test  ## the fuzzers of all that reads files; option: MINUTES=60
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-emit-index-url --no-header

docs: .venv/.ready-test  ## the API reference, from the docstrings, into build/docs
	scripts/docs.sh

lock: .venv/.ready-test  ## versions and hashes of all dependencies, from pyproject.toml; UPGRADE=1 takes the newest ones
	$(BIN)/python -m pip install -q uv
	$(COMPILE) $(if $(UPGRADE),--upgrade,-c constraints.txt) pyproject.toml scripts/build.in --all-extras -o constraints.txt
	sed -i -E "s/ *(;| and) (python_full_version < '3.14'|platform_machine == 'x86_64'|sys_platform == 'linux'|platform_python_implementation != 'PyPy')//g" constraints.txt
	$(COMPILE) --generate-hashes -c constraints.txt pyproject.toml scripts/build.in -o scripts/demo.lock
	$(COMPILE) --generate-hashes -c constraints.txt scripts/build.in -o scripts/build.lock
	for part in ffcv dali dev; do \
	  $(COMPILE) --generate-hashes -c constraints.txt pyproject.toml scripts/build.in --extra $$part $$([ $$part = dev ] && echo --extra fuzz) -o scripts/$$part.lock; \
	done

licences: .venv/.ready-test  ## docs/LICENCES.md, from the metadata of what is installed
	$(BIN)/python -m pip install -q pip-licenses
	$(BIN)/pip-licenses --format markdown --with-urls --ignore-packages std-fast pip-licenses prettytable wcwidth >docs/LICENCES.md

clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find std_fast pipelines benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## and .venv
	rm -rf .venv .venv-oldest .venv-newest

.venv/.ready-demo .venv/.ready-test .venv-oldest/.ready-oldest .venv-newest/.ready-newest: pyproject.toml constraints.txt scripts/bootstrap.sh $(wildcard scripts/*.lock)
	@scripts/bootstrap.sh $(patsubst .ready-%,%,$(@F))
