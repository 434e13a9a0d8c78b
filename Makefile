# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Eleven minutes, a third above what a fresh clone needs (docs/testing.md) on a machine as fast as
# that one; a slower one is allowed more (tests/cpu_budget.py).
CPU_BUDGET_S ?= 660
PYTEST_ARGS ?=
# Where it is set, every process that a test starts compiles this project's modules anew.
unexport PYTHONDONTWRITEBYTECODE

# Of the long tier what starts hosts, queues and launchers, and waits for them, and whole documents.
NOT_IN_CI := $(addprefix --ignore-glob=tests/test_,launch_*.py readme.py docs.py contributing.py \
	eval_saturate.py pretrain_alarms.py pretrain_kill.py)

.PHONY: demo quick test test-long test-long-ci test-slow lint docs install clean

demo: install ## the whole path on real cells, ends with demo_out/report.html
	rm -rf demo_out
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh demo_out

# Tests in memory, in one process: at every save.
quick: install ## the arithmetic, under 45 s
	$(PYTEST) -n0 -q -m quick $(PYTEST_ARGS)

# What proves a contract, within a budget of processor time: docs/testing.md.
test: install ## the default tests and the linter; `make test PYTEST_ARGS="-p randomly"`: in any order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.cpu_budget $(CPU_BUDGET_S) \
		$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-long: install ## several hosts, SLURM, MPI, launched runs, whole documents
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m long $(PYTEST_ARGS)

test-long-ci: install ## the part of it that CI runs: what does not wait for hosts and launchers
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "long and not slow" $(NOT_IN_CI) $(PYTEST_ARGS)

test-slow: install ## everything, torture and scale too
	$(PYTEST) -m "slow or long or not slow" $(PYTEST_ARGS)

lint: install ## types (the pyright package needs node, and fetches its code from npm once)
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: install ## the documents as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/installed ## .venv from the lock

$(VENV)/installed: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	@# torch with what its build needs (the CUDA build needs more than the CPU build); then the rest,
	@# where every package is pinned and nothing is resolved.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean: ## removes .venv and what the demo made
	rm -rf $(VENV) demo_out site
