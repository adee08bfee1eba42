# make study | check | test | docs | figures | lab | copies | bench | bench-peers | evidence | lock | clean-runs. Each sets the environment up first; a second call installs nothing.
PYTHON  ?= python3
PROFILE ?= quick
# The campaign has another default.
evidence: PROFILE := $(if $(filter file,$(origin PROFILE)),reference,$(PROFILE))
ONLY    ?=
FLAGS   ?=
CORES   ?= 2
BIN     := .venv/bin

.PHONY: study check test docs figures lab copies bench bench-peers evidence lock clean-runs
.DELETE_ON_ERROR:

# The stamp is newer than both files exactly when the environment holds what they ask for. A torch that is there already, such as
# the CPU build, is kept.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

study: .venv/installed
	$(BIN)/salvit study --profile $(PROFILE) $(if $(ONLY),--only $(ONLY)) $(FLAGS)

# What needs one process: about two minutes on two cores.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(CORES) -m "not processes and not slow"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(CORES) -m "not slow"

# The book, from the project's own records: nothing is measured, and what is in figures/ stays as it is.
BOOK := build/book
docs: .venv/installed
	rm -rf $(BOOK) && mkdir -p $(BOOK) && ln -s ../../data $(BOOK)/data
	SALVIT_ROOT=$(BOOK) $(BIN)/salvit study --records reference --notebooks notebooks
	cp -r docs $(BOOK)/pages && mv $(BOOK)/figures/executed $(BOOK)/pages/notebooks && mv $(BOOK)/figures $(BOOK)/pages/
	$(BIN)/python -m sphinx -W --keep-going -q -b html $(BOOK)/pages $(BOOK)/site
	@echo "the book is $(BOOK)/site/index.html"

# figures/ is what was drawn on this machine, and git ignores it; figures/reference/ is the book's, committed.
figures: docs
	rm -rf figures/reference && mkdir -p figures/reference
	cp $(BOOK)/pages/figures/*.* figures/reference/

# JupyterLab saves outputs into the notebook: it gets copies, which git ignores. Where the project's is newer, the copy that stands
# there is kept beside it, as NAME.~1~. (The options of cp that do this are GNU's alone.)
copies:
	mkdir -p lab
	set -e; for one in notebooks/*.ipynb; do copy=lab/$${one##*/}; n=1; \
	if [ -e "$$copy" ] && ! [ "$$one" -nt "$$copy" ]; then continue; fi; \
	while [ -e "$$copy.~$$n~" ]; do n=$$((n + 1)); done; \
	if [ -e "$$copy" ]; then mv "$$copy" "$$copy.~$$n~"; fi; cp "$$one" "$$copy"; done

lab: .venv/installed copies
	$(BIN)/jupyter lab --notebook-dir=lab $(if $(filter 0,$(shell id -u)),--allow-root) $(FLAGS)

bench: .venv/installed
	set -e; for script in benchmarks/private.py benchmarks/training.py benchmarks/replacement.py; do $(BIN)/python $$script; done

# SPU has an environment of its own: it wants older packages than ours, and has wheels for two versions of Python alone.
.venv-peers/installed: benchmarks/peers/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' || \
	{ echo "SPU needs Python 3.10 or 3.11: make bench-peers PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -q -r $<
	touch $@

bench-peers: .venv-peers/installed .venv/installed
	$(BIN)/python benchmarks/peers/run.py $(FLAGS)

# The campaign of trainings: goes on where it was, at the lowest priority; stop it at any moment.
evidence: .venv/installed
	nice -n 19 $(BIN)/salvit evidence --profile $(PROFILE) $(FLAGS)

# Newer versions within pyproject.toml's ranges; torch says itself which CUDA libraries it wants.
lock: .venv/installed
	$(BIN)/uv pip compile --universal --python-version 3.10 pyproject.toml --all-extras -q --no-header --no-annotate -o requirements.lock
	sed -i -E '/^(nvidia|cuda|triton)/d' requirements.lock
	(sed -n '1,/- pip:/p' environment.yml; sed -e 's/^/      - "/' -e 's/$$/"/' requirements.lock; echo '      - "--no-deps --editable ."') > environment.new
	mv environment.new environment.yml

clean-runs:
	rm -rf data/runs figures/executed
