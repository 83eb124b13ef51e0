# What a developer runs. `make` alone lists the targets.

PYTHON ?= python3
CELERY ?= 5.7.0
VENV ?= .venv

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
space := $(subst ,, )
UPSTREAM := PYTHONPATH=extra $(BIN)/python -m upstream

# In CI, a service that cannot be started fails the tests; elsewhere it skips them.
ifdef CI
export AZURE_TESTS_REQUIRE_SERVICES := 1
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install node demo test unit integration smoke lint docs patch upstream-test upstream-integration bench \
	tox check-wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=… chooses the interpreter of $(VENV), CELERY=… the release for upstream ($(CELERY))."

install: $(VENV)/.installed  ## make .venv, with the plugin (editable) and what the tests need

node: node_modules/.installed  ## install Azurite, the storage emulator

demo: install node  ## run a worker on Azurite with a managed identity, and show its results
	@$(BIN)/python examples/azure/demo.py

test: unit integration smoke  ## run all tests

unit: install  ## run the unit tests (needs no Node)
	$(PYTEST) t/unit

integration: install node  ## run the tests on Azurite with real credentials
	$(PYTEST) t/integration

smoke: install node  ## run the tests on pytest-celery's clusters
	$(PYTEST) -p pytest_celery.plugin t/smoke

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the documentation; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

patch: install  ## write the upstream patch to build/
	@$(UPSTREAM) patch $(CELERY)

upstream-test: install  ## run Celery's own unit tests without and with the patch (9 minutes; then 5)
	@$(UPSTREAM) test $(CELERY)

upstream-integration: $(VENV)/.installed-dev node  ## run Celery's integration tests, with Redis too (an hour)
	@PYTHONPATH=extra:. $(BIN)/python -m upstream integration $(CELERY)

bench: $(VENV)/.installed-dev node  ## measure this backend beside released Celery's; writes docs/measurements.rst
	$(BIN)/python -m t.benchmarks.results build/results.json
	$(BIN)/python -m t.benchmarks.chords build/chords.json
	$(BIN)/python -m t.benchmarks.report build/results.json build/chords.json docs

tox: $(VENV)/.installed-dev  ## run the unit tests on Celery 5.4 to 5.7 and each Python that is on PATH or in pyenv
	PATH="$(subst $(space),:,$(wildcard $(HOME)/.pyenv/versions/3.1?.*/bin)):$$PATH" $(BIN)/tox run

check-wheel: $(VENV)/.installed-dev node  ## build the wheel, and use it in an empty environment with released Celery
	@PYTHONPATH=. $(BIN)/python extra/plugin/check_wheel.py

clean:  ## remove what builds and tests leave (but keep .venv, node_modules and .cache)
	rm -rf build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache .tox extra/plugin/*.egg-info
	find celery examples extra t -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "This needs Python 3.10 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) …"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py requirements/default.txt \
		requirements/extras/azureblockblob.txt requirements/test.txt
	@echo "Installing Celery, the Azure libraries and what the tests need (a minute) …"
	@$(BIN)/pip install --quiet -e . -r requirements/test.txt
	@touch $@

$(VENV)/.installed-%: requirements/%.txt $(VENV)/.installed
	@echo "Installing requirements/$*.txt …"
	@$(BIN)/pip install --quiet -r $<
	@touch $@

node_modules/.installed: package.json package-lock.json
	@node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null && command -v npm >/dev/null \
		|| { echo "This needs Node 18 or newer with npm, to run Azurite: install it from your system's packages."; exit 1; }
	@echo "Installing Azurite …"
	@npm ci --no-audit --no-fund --loglevel=error
	@touch $@
