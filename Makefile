# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs install clean

demo: install ## the whole path on real cells, ends with demo_out/report.html
	rm -rf demo_out
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh demo_out

test: install ## the default tests and the linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install ## and the slow ones
	$(BIN)/python -m pytest -m "slow or not slow"

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
