# Every target makes its own environment in .venv, from requirements.lock, with hashes.
# Another Python than the one on the path:  make PYTHON=python3.12

PYTHON ?= python3
PY := .venv/bin/python
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))

# What the caller has activated must not decide what gets built or run.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo quick test lab notebooks lint lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.ready  ## generate and up-sample with the shipped weights, into outputs/demo.png
	$(PY) -m arbscale demo $(ARGS)

quick: .venv/.ready  ## unit tests but the slow ones, in a minute or two
	$(PY) -m pytest tests -m "not slow" $(ARGS)

test: .venv/.ready  ## unit tests with their coverage, then every notebook against its outputs
	$(PY) -m pytest tests --cov --cov-report=term-missing:skip-covered $(ARGS)
	$(PY) -m pytest --nbval notebooks

lab: .venv/.ready  ## open the notebooks in JupyterLab
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m jupyterlab $(ARGS) notebooks

notebooks: .venv/.ready  ## execute and save every notebook, in order
	$(PY) -m jupyter execute --inplace $(NOTEBOOKS)
	$(PY) -c "$$STRIP" $(NOTEBOOKS)

lint: .venv/.ready  ## ruff's rules and its formatting, over code and notebooks
	$(PY) -m ruff check
	$(PY) -m ruff format --check

lock:  ## write requirements.lock anew (delete it first to take newer versions)
	$(check-python)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile --quiet --universal --generate-hashes --all-extras \
		--python-version 3.10 --custom-compile-command "make lock" --output-file requirements.lock \
		pyproject.toml

clean:  ## remove the environment, caches and builds (never outputs/ or runs/)
	rm -rf .venv build dist .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +

# The mark is removed first and set last: a half-built environment has none and starts afresh.
.venv/.ready: pyproject.toml requirements.lock
	$(check-python)
	test -f $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip sync --python $(PY) requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	touch $@

define check-python
@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is not there; install Python, or name \
another: make PYTHON=/path/to/python3" >&2; exit 1; }
@"$(PYTHON)" -c "$$CHECK"
endef

define CHECK
import re, sys
found = sys.version_info[:2]
text = open("pyproject.toml").read()
low, high = map(int, re.search('requires-python = ">=3.([0-9]+),<3.([0-9]+)"', text).groups())
if not (3, low) <= found < (3, high):
    sys.exit("%s is Python %d.%d, and arbscale needs 3.%d to 3.%d; name another: "
             "make PYTHON=/path/to/python3" % ((sys.executable,) + found + (low, high - 1)))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s has no module venv; install it (Debian, Ubuntu: apt install python%d.%d-venv) or "
             "name another: make PYTHON=/path/to/python3" % ((sys.executable,) + found))
endef
export CHECK

# When and with which Python a notebook ran differs each time; outputs and counts stay. Large
# pictures are stored with 256 colours, dithered where the limit of the notebooks' contract allows.
define STRIP
import base64, io, os, sys, nbformat
from PIL import Image
def smaller(png, dither):
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    palette, buffer = picture.quantize(256), io.BytesIO()
    picture.quantize(palette=palette, dither=dither).save(buffer, "png", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode() + "\n", key=len)
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.get("language_info", {}).pop("version", None)
    dither = Image.Dither.FLOYDSTEINBERG if os.path.getsize(path) < 2_000_000 else Image.Dither.NONE
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for data in [output.get("data", {}) for output in cell.get("outputs", [])]:
            if len(data.get("image/png", "")) > 20_000:
                data["image/png"] = smaller(data["image/png"], dither)
    nbformat.write(notebook, path)
endef
export STRIP
