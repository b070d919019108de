"""Results with all that is needed to read them: as JSON files, and as one document of tables."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from arbscale import store
from arbscale.evaluation.tables import finite, table
from arbscale.model import ArbitraryScaleModel
from arbscale.store import InputError

LIBRARIES = ("arbscale", "torch", "torchvision", "numpy", "scikit-image", "lpips", "torch-fidelity")
COMPARED = "Denoisers with and without a transformer"
TITLE = """# Results

Below each table stands the command that measured it. Where the command names a model by its folder,
the weights are those in the folder, not those that ship."""
UNALIGNED = "unaligned"  # folder beside a report: the same of the weights before the alignment


def header(model: ArbitraryScaleModel, task: str, protocol: dict) -> dict:
    """Return what every report starts with: model, protocol, versions, machine and command."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "task": task,
        "model": model.manifest.get("name", model.preset.name),
        "weights": [entry["sha256"] for entry in model.manifest.get("files", [])],
        "protocol": protocol,
        "versions": versions,
        "machine": {
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        },
        "command": shlex.join(["python", "-m", "arbscale", *sys.argv[1:]]),
    }


def write(report: dict, path: Path) -> None:
    """Write a report as JSON, whole or not at all.

    JSON has no infinity and no NaN: such numbers become null, and `null` in the report says why.
    """
    report = finite(report)
    store.write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def read(path: Path) -> dict:
    """Read a report; FileNotFoundError, or ValueError for another file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if {"task", "model", "protocol", "results"} <= set(report):
            return report
    except (ValueError, TypeError):
        pass
    raise InputError(f"{path} is not a report of evaluate, bench or ablate")


def read_with_unaligned(path: Path) -> dict:
    """Read a report, with the rows of the one in the folder `UNALIGNED` beside it, if any.

    Raises ValueError where the two were not measured in the same way.
    """
    report, path = read(path), path.parent / UNALIGNED / path.name
    if not path.is_file():
        return report
    before = read(path)
    if before["protocol"] != report["protocol"]:
        raise InputError(f"{path} was measured by another protocol; write it again")
    for scale, methods in report["results"].items():
        methods["ours, before the alignment"] = before["results"][scale]["ours"]
    return report


def document(paths: Iterable[Path]) -> str:
    """Return reports as one markdown document: a heading per model, its tables below.

    A folder stands for all reports in it and below. Models come in the order of their first report,
    comparisons of denoisers after them.
    """
    files: list[Path] = []
    for path in paths:
        files += _below(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no JSON file in {', '.join(map(str, paths))}")
    sections: dict[str, list[str]] = {}
    tables: list[tuple[str, str]] = []
    for path in files:
        with store.reading(path):
            report = read_with_unaligned(path)
            name = COMPARED if report["task"] == "ablate" else str(report["model"])
            tables.append((name, table(report)))
    for name, text in sorted(tables, key=lambda x: x[0] == COMPARED):
        sections.setdefault(name, [f"## {name}"]).append(text)
    return "\n\n".join([TITLE, *(part for parts in sections.values() for part in parts)])


def _below(folder: Path) -> list[Path]:
    """Return the reports below a folder: JSON files, but for what other commands keep there."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*.json"))]
    found = [x for x in found if x.name != store.MANIFEST and x.parent.name != UNALIGNED]
    kept = (x for x in found if not any(re.search(r"^\.|\.partial$", n) for n in x.parts))
    return [folder / name for name in kept]
