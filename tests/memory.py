"""Print the most memory that each notebook's kernel takes: `python tests/memory.py [NOTEBOOK...]`.

A hosted notebook, as on Binder, is ended at 2 GB.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PEAK = "import resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"  # kB on Linux


def peak(path: Path) -> float:
    """Execute a notebook, without saving it; return its kernel's peak in MB."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return int(notebook.cells[-1].outputs[0]["data"]["text/plain"]) / 1024


if __name__ == "__main__":
    for path in tqdm([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("[0-9]*.ipynb"))):
        tqdm.write(f"{path.stem:28} {peak(path.resolve()):6.0f} MB")
