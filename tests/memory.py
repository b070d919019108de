"""Print what each notebook's kernel takes: `python tests/memory.py [NOTEBOOK...]`.

That is its CPU seconds over all cores, and its most memory: Binder ends a notebook at 2 GB.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
USE = "import resource; print(*resource.getrusage(resource.RUSAGE_SELF)[:3])"  # s, s, kB on Linux


def use(path: Path) -> tuple[float, float]:
    """Execute a notebook, without saving it; return its kernel's CPU seconds and peak in MB."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(USE))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    user, system, peak = map(float, notebook.cells[-1].outputs[0]["text"].split())
    return user + system, peak / 1024


if __name__ == "__main__":
    for path in tqdm([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("[0-9]*.ipynb"))):
        tqdm.write("{:28} {:4.0f} s {:6.0f} MB".format(path.stem, *use(path.resolve())))
