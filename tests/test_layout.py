"""Which part of the package may import which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "arbscale"
WINGS = ("data", "training", "evaluation")
FRONT = sorted({p.stem for p in PACKAGE.glob("*.py")} - {"__main__"})  # the command line joins all


def imported(path: Path, inside_functions: bool) -> set[str]:
    """Names below `arbscale` that a module imports, such as {"coords", "data.images"}."""
    assert path.is_file()
    found, queue = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            queue += ast.iter_child_nodes(node)
    return {name.removeprefix("arbscale.") for name in found if name.startswith("arbscale.")}


@pytest.mark.parametrize("name", FRONT)
def test_the_front_loads_no_wing(name):
    parts = {found.split(".")[0] for found in imported(PACKAGE / f"{name}.py", False)}
    assert not parts & set(WINGS)


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").glob("*.py")), ids=lambda p: p.stem)
def test_data_needs_coordinates_alone(path):
    assert {found.split(".")[0] for found in imported(path, True)} <= {"coords", "store", "data"}


@pytest.mark.parametrize(("wing", "other"), [WINGS[1:], WINGS[:0:-1]])
def test_training_and_evaluation_know_of_each_other_what_is_public(wing, other):
    submodules = {path.stem for path in (PACKAGE / other).glob("*.py")}
    for path in (PACKAGE / wing).glob("*.py"):
        names = [found.split(".") for found in imported(path, True)]
        inside = [name for name in names if name[0] == other and submodules & set(name[1:2])]
        assert not inside, f"{path.name}: {inside}"


def test_the_package_is_seen_at_a_glance():
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= 20


def test_errors_for_users_have_classes_of_their_own():
    for path in sorted(PACKAGE.rglob("*.py")):
        raised = [x.exc for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Raise)]
        names = {x.func.id for x in raised if isinstance(getattr(x, "func", None), ast.Name)}
        if path.parent.name != "widgets":  # which show their errors beside the image
            assert not names & {"ValueError", "RuntimeError"}, path
