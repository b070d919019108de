"""The solutions of the notebooks' exercises run, each after the cells that it needs."""

import ast
import builtins
import json
import re
from functools import cache
from pathlib import Path

import pytest

from arbscale.training import optimise

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
STEPS = 12  # of each training
SLOW = re.compile(r"\b(train_\w+|finetuned?|generate|sample|upscale|dpm_solver_pp|walk_back)\(")


@cache
def names(code: str) -> tuple[set[str], set[str]]:
    """Names that the code reads and names that it binds at its top level."""
    tree = ast.parse(code)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    reads = {node.id for node in found if isinstance(node.ctx, ast.Load)}
    binds = {node.id for node in found if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            binds.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            binds |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return reads, binds


def what_it_needs(code: list[str], solution: str) -> str:
    """Those of the cells before a solution that bind a name it needs, in order."""
    chosen, wanted = [], names(solution)[0] - set(dir(builtins))
    for cell in reversed(code):
        reads, binds = names(cell)
        if binds & wanted or re.search(r"^SEED = |^import matplotlib", cell, re.M):
            chosen.append(cell)
            wanted |= reads
    return "\n\n".join(reversed(chosen))


def solutions():
    """One case for each code block in the exercises of each notebook."""
    for path in sorted(FOLDER.glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        code = [text for text, kind in sources if kind == "code" and "%pip" not in text]
        prose = "\n".join(text for text, kind in sources if kind == "markdown")
        blocks = re.findall(r"^```python\n(.*?)^```", prose.split("## Exercises")[1], re.M | re.S)
        for k, block in enumerate(blocks):
            cells = what_it_needs(code, block)
            marks = [pytest.mark.slow] if SLOW.search(cells + block) else []
            yield pytest.param(cells, block, id=f"{path.stem[:2]}-{k + 1}", marks=marks)
            code.append(block)


def briefly(stage, steps, *more):
    """Train for a few steps, whatever is asked for."""
    return optimise(stage, min(steps, STEPS), *more)


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "solution"), list(solutions()))
def test_a_solution_runs(cells, solution, monkeypatch, tmp_path):
    """What the cells assert of a training is left to the notebook's own run."""
    torch = pytest.importorskip("torch")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    monkeypatch.setattr("arbscale.training.first_stage.optimise", briefly)
    monkeypatch.setattr("arbscale.training.denoiser.optimise", briefly)
    monkeypatch.chdir(tmp_path)  # where a notebook would write
    space = {"__name__": "__main__"}
    try:
        exec(compile(cells, "cells", "exec", optimize=1), space)  # without asserts
        exec(compile(solution, "solution", "exec"), space)
    finally:
        torch.set_grad_enabled(True)
        pyplot.close("all")
