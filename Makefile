# Most targets build the environment .venv first, from requirements.lock with its hashes.
# To use another Python than the one on the path:  make PYTHON=python3.12

PYTHON ?= python3
PY := .venv/bin/python
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))
# Two processes of one thread each; for more:  make test ARGS="-n 8"
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# An environment that the caller has activated must not affect the build.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo quick test browser lab page notebooks lint lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.ready  ## generate and up-sample with the shipped weights; writes outputs/demo.png
	$(PY) -m arbscale demo $(ARGS)

quick: .venv/.ready  ## run all tests but the slow ones, in a minute or two
	$(PYTEST) --dist worksteal tests -m "not slow and not browser" $(ARGS)

test: .venv/.ready  ## run all tests with coverage, then every notebook against its saved outputs
	$(PYTEST) --dist worksteal tests -m "not browser" --cov \
		--cov-report=term-missing:skip-covered $(ARGS)
	$(PYTEST) --dist loadfile --nbval notebooks

browser: .venv/.ready  ## run all tests in Chromium, every notebook in JupyterLab too, and measure
	$(PY) -m pytest tests/browser $(ARGS)
	$(PY) tests/browser/measure.py

lab: .venv/.ready  ## open the notebooks in JupyterLab
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m jupyterlab \
		--LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb \
		--ContentsManager.hide_globs=outputs --ContentsManager.hide_globs=__pycache__ $(ARGS)

# Each visitor gets a separate process of at most 3 GB, which ends two minutes after the visitor
# leaves; two are started in advance. An idle one must not occupy a core (OMP_WAIT_POLICY). The
# extensions left out need a newer JupyterLab.
page: .venv/.ready  ## serve the explorer as a page without code, for several visitors
	ulimit -d 3000000; OMP_WAIT_POLICY=PASSIVE PATH="$(CURDIR)/.venv/bin:$$PATH" \
		$(PY) -m voila notebooks/page.ipynb --preheat_kernel=True --pool_size=2 \
		--MappingKernelManager.cull_idle_timeout=120 \
		--MappingKernelManager.cull_interval=30 \
		--VoilaConfiguration.extension_denylist=@jupyter-notebook/lab-extension \
		--VoilaConfiguration.extension_denylist=@voila-dashboards/jupyterlab-preview $(ARGS)

notebooks: .venv/.ready  ## execute and save all notebooks, in order
	$(PY) -m jupyter execute --inplace $(NOTEBOOKS)
	$(PY) -c "$$STRIP" $(NOTEBOOKS)

lint: .venv/.ready  ## check code and notebooks with ruff (rules and formatting)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

lock:  ## update requirements.lock (delete it first to get newer versions)
	$(check-python)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile --quiet --universal --generate-hashes --all-extras \
		--python-version 3.10 --custom-compile-command "make lock" --output-file requirements.lock \
		pyproject.toml

clean:  ## remove the environment, caches and builds (keeps outputs/ and runs/)
	rm -rf .venv build dist .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +

# .ready is removed first and created last, so an unfinished environment is built again.
.venv/.ready: pyproject.toml requirements.lock
	$(check-python)
	test -f $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip sync --python $(PY) requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	touch $@

define check-python
@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) was not found; install Python, or use \
another: make PYTHON=/path/to/python3" >&2; exit 1; }
@"$(PYTHON)" -c "$$CHECK"
endef

define CHECK
import re, sys
found = sys.version_info[:2]
text = open("pyproject.toml").read()
low, high = map(int, re.search('requires-python = ">=3.([0-9]+),<3.([0-9]+)"', text).groups())
if not (3, low) <= found < (3, high):
    sys.exit("%s is Python %d.%d, but arbscale needs 3.%d to 3.%d; use another: "
             "make PYTHON=/path/to/python3" % ((sys.executable,) + found + (low, high - 1)))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s has no module venv; install it (Debian, Ubuntu: apt install python%d.%d-venv) or "
             "use another: make PYTHON=/path/to/python3" % ((sys.executable,) + found))
endef
export CHECK

# Removes the time and the Python version of each run; keeps outputs and execution counts.
define STRIP
import sys, nbformat
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
endef
export STRIP
