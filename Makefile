# Two commands for a fresh machine with python3, make and git: `make demo` and `make test`.
# Everything that they need goes into $(VENV) or is installed by tests/install-components.
PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
# Of the newest releases only: nothing that the chart's tests check depends on the version of Dask.
TEST_EXTRAS ?= chart
# Tests wait for processes to start and end most of the time: three run at once on two cores.
TEST_WORKERS ?= 3
BIN = $(VENV)/bin

.PHONY: demo test test-floor test-store lint bench docs dashboards pictures clean

demo: $(VENV)/installed
	$(BIN)/dask memusage demo $(DEMO_ARGS)

test: $(VENV)/installed-test $(addprefix $(VENV)/installed-,$(TEST_EXTRAS))
	PYTHON=$(BIN)/python tests/install-components
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

# The oldest releases that pyproject.toml declares, in an environment of their own.
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINT=tests/floor.txt TEST_EXTRAS= TEST_ARGS="$(TEST_ARGS)"

# Spans against a real store of traces. That takes minutes to install (850 MB), in an environment of
# its own, so it is no part of `make test`, which runs it where it is installed already.
STORE = .venv-store
test-store: $(VENV)/installed-test $(STORE)/installed
	$(BIN)/python -m pytest tests/test_real_trace_store.py $(TEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

dashboards: $(VENV)/installed-dev
	$(BIN)/python -m grafana

# Needs Prometheus and Chromium, a Node with npm, and ten minutes; no part of the tests.
pictures: $(VENV)/installed-pictures
	npm ci --prefix grafana/pictures --legacy-peer-deps --ignore-scripts --no-audit --no-fund
	npm run build --prefix grafana/pictures
	$(BIN)/python -m grafana.pictures $(PICTURES_ARGS)

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python deploy/helm/generate.py

clean:
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STORE)/installed: tests/store.txt
	$(PYTHON) -m venv $(STORE)
	$(STORE)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . $(if $(CONSTRAINT),-c $(CONSTRAINT))
	touch $@

# With what makes the Dask operator's objects, and its definitions: no client of Kubernetes with it.
$(VENV)/installed-chart: pyproject.toml | $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[chart]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps dask-kubernetes==2026.3.0
	touch $@

$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]' $(if $(CONSTRAINT),-c $(CONSTRAINT))
	touch $@
