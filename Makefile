# make study | test | lab | bench | clean-runs. Each sets the environment up first; a second call installs nothing.
PYTHON  ?= python3
PROFILE ?= quick
ONLY    ?=
BIN     := .venv/bin

.PHONY: study test lab bench clean-runs
.DELETE_ON_ERROR:

# The stamp is newer than pyproject.toml exactly when the environment holds what pyproject.toml asks for.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[test]"
	touch $@

study: .venv/installed
	$(BIN)/python -m salvit_core.study --profile $(PROFILE) $(if $(ONLY),--only $(ONLY))

test: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: .venv/installed
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script; done

clean-runs:
	rm -rf data/runs figures/executed
