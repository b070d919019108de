"""Results with all that is needed to read them: as JSON, and as markdown tables."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from arbscale.model import ArbitraryScaleModel
from arbscale.store import MANIFEST

LIBRARIES = ("arbscale", "torch", "torchvision", "numpy", "scikit-image", "lpips", "torch-fidelity")
TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}
COMPARED = "Denoisers with and without a transformer"
TITLE = """# Results

Every number that was measured on the shipped models; under each table stands its command."""
UNALIGNED = "unaligned"  # folder beside a report: the same of the weights before the alignment


def header(model: ArbitraryScaleModel, task: str, protocol: dict) -> dict:
    """Return what every report starts with: model, protocol, versions, machine and command."""
    return {
        "task": task,
        "model": model.manifest.get("name", model.preset.name),
        "weights": [entry["sha256"] for entry in model.manifest.get("files", [])],
        "protocol": protocol,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        },
        "command": "python -m arbscale " + " ".join(sys.argv[1:]),
    }


def write(report: dict, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> dict:
    """Read a report; FileNotFoundError or ValueError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no report {path}; check the path")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if {"task", "model", "protocol", "results"} <= set(report):
            return report
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"{path} is no report of `python -m arbscale evaluate`, `bench` or `ablate`; write it again"
    )


def read_with_unaligned(path: Path) -> dict:
    """Read a report, with the rows of the one in the folder `UNALIGNED` beside it, if any.

    Raises ValueError where the two were not measured in the same way.
    """
    report, path = read(path), path.parent / UNALIGNED / path.name
    if not path.is_file():
        return report
    before = read(path)
    if before["protocol"] != report["protocol"]:
        raise ValueError(f"{path} was measured by another protocol; write it again")
    name = "ours, before the alignment"
    if report["task"] == "generate":
        rows = report["results"]["rows"]
        for row in [row for row in before["results"]["rows"] if row["method"] == "ours"]:
            of_size = [i for i, other in enumerate(rows) if other["size"] == row["size"]]
            rows.insert(of_size[-1] + 1, {**row, "method": name})
    else:
        for scale, methods in report["results"].items():
            methods[name] = before["results"][scale]["ours"]
    return report


def document(paths: Iterable[Path]) -> str:
    """Return reports as one markdown document: a heading per model, its tables below.

    A folder stands for all reports in it and below. Models come in the order of their first report,
    comparisons of denoisers after them.
    """
    files = [file for path in paths for file in (_below(path) if path.is_dir() else [path])]
    reports = [read_with_unaligned(file) for file in files]
    sections: dict[str, list[str]] = {}
    for report in sorted(reports, key=lambda report: report["task"] == "ablate"):
        name = COMPARED if report["task"] == "ablate" else report["model"]
        sections.setdefault(name, [f"## {name}"]).append(table(report))
    return "\n\n".join([TITLE, *(part for parts in sections.values() for part in parts)])


def _below(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.json"))
    return [x for x in found if x.name != MANIFEST and x.parent.name != UNALIGNED]


def table(report: dict) -> str:
    """Return a report as markdown: one line that says what it is, the table, the command."""
    writers = {"generate": _generation, "bench": _speed, "ablate": _ablation}
    body = writers.get(report["task"], _pairs)(report)
    return "\n".join([_caption(report), "", *body, "", f"Measured by `{report['command']}`."])


def _caption(report: dict) -> str:
    protocol, machine = report["protocol"], report["machine"]
    facts = [f"`{report['model']}`, {report['task']}"]
    if "data" in protocol:
        facts.append(f"data {protocol['data']}, {protocol['split']}")
    if "pictures" in protocol:
        facts.append(f"{protocol['pictures']} images")
    if "name" in protocol:
        border = "no border" if protocol["shave"] is None else f"border scale + {protocol['shave']}"
        facts.append(f"protocol {protocol['name']} ({protocol['space'].upper()}, {border})")
    if sampling := protocol.get("sampling"):
        facts.append("{sampler}, {steps} steps, seed {seed}".format(**sampling))
    facts.append(f"{machine['device']}, threads: {machine['threads']}")
    return "; ".join(facts) + ":"


def _pairs(report: dict) -> list[str]:
    """One row a scale and method."""
    names = [name for name in TITLES if name != "lpips" or report["protocol"]["lpips"]]
    rows = []
    for scale, methods in report["results"].items():
        for method, values in methods.items():
            rows.append(
                [f"x{scale}", method, *(f"{values[name]:.{DIGITS[name]}f}" for name in names)]
            )
    return _markdown(["scale", "method", *(TITLES[name] for name in names)], rows)


def _generation(report: dict) -> list[str]:
    """Distances by size and method; then SelfSSIM's matrices and the patches."""
    protocol, results = report["protocol"], report["results"]
    distance = distance_title(protocol["features"])
    rows = [
        [
            _spell(row["size"]),
            row["method"],
            str(row["pictures"]),
            f"{row['distance']:.4g} ± {row['distance_pm']:.2g}",
            f"{row['precision']:.3f} ± {row['precision_pm']:.3f}",
            f"{row['recall']:.3f} ± {row['recall_pm']:.3f}",
        ]
        for row in results["rows"]
    ]
    lines = [
        f"{_networks(protocol)}; against {protocol['reference']} real images "
        f"({protocol['real pictures']}); ± is {protocol['interval']}.",
        "",
        *_markdown(["size", "method", "images", distance, "precision", "recall"], rows),
    ]
    if consistency := results["self_ssim"]:
        lines += ["", *_matrices(consistency)]
    if patches := results["patches"]:
        kind = "Patch FID" if distance == "FID" else f"Patch distance ({distance}; not an FID)"
        lines += [
            "",
            f"{kind}: {patches['distance']:.4g} over {patches['patches']} patches of "
            f"{patches['side']} px at sizes from {patches['sizes'][0]} to {patches['sizes'][1]}.",
        ]
    if near := results.get("neighbours"):
        columns = ["images", *(f"{100 * level:.0f} %" for level in near["levels"])]
        rows = [
            [method, *(f"{value:.3g}" for value in values)]
            for method, values in near.items()
            if method not in ("pictures", "levels")
        ]
        lines += [
            "",
            f"Distance to the nearest of {near['pictures']} training images, quantiles:",
            "",
            *_markdown(columns, rows),
        ]
    return lines


def _networks(protocol: dict) -> str:
    distance, neighbours = protocol["distance over"], protocol["precision and recall over"]
    if neighbours.startswith(distance):
        return f"Distance, precision and recall over {neighbours}"
    return f"Distance over {distance}; precision and recall over {neighbours}"


def distance_title(features: str) -> str:
    """Return what the Fréchet distance over these features is called: FID over Inception alone."""
    return "FID" if features == "inception" else f"Fréchet distance, {features} features"


def _matrices(consistency: dict) -> list[str]:
    sizes = [_spell(size) for size in consistency["sizes"]]
    rows = [
        [method, variant, at, *(f"{value:.4f}" for value in values)]
        for method, variants in consistency.items()
        if isinstance(variants, dict)
        for variant, matrix in variants.items()
        for at, values in zip(sizes, matrix, strict=True)
    ]
    columns = ["method", "variant", "measured at", *(f"against {size}" for size in sizes)]
    return [f"SelfSSIM over {consistency['pictures']} images:", "", *_markdown(columns, rows)]


def _speed(report: dict) -> list[str]:
    """One row a size and task."""
    rows = [
        [
            _spell(row["size"]),
            row["task"],
            f"{row['images_per_second']:.4g}",
            f"{1000 * row['seconds']:.4g}",
            f"{1000 * row['spread']:.2g}" if row["repeats"] > 1 else "-",
            str(row["repeats"]),
            "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
        ]
        for row in report["results"]
    ]
    titles = ["images per second", "ms per call", "quartiles apart, ms", "calls", "peak memory, MB"]
    batch = f"Batch {report['protocol']['batch']}, {report['protocol']['precision']}."
    return [batch, "", *_markdown(["size", "task", *titles], rows)]


def _ablation(report: dict) -> list[str]:
    """One table a comparison; one row a contestant, the mean and deviation over its seeds."""
    protocol, results = report["protocol"], report["results"]
    titles = ["parameters, M", "multiply-adds, M", "ms per step", "kept, MB", "held-out loss"]
    titles += ["against the first", protocol["features"] + " distance", "precision", "recall"]
    lines = [
        f"{protocol['steps']} steps, {protocol['seeds']} seeds, mean ± deviation over them. Loss: "
        f"{protocol['held-out loss']}. Distance over {protocol['distance over']}; "
        f"{protocol['drawn by']}.",
    ]
    for title, (data, names) in protocol["comparisons"].items():
        rows, losses, floor = [], {}, results["floors"][data]
        for name in names:
            runs = [r for r in results["runs"] if (r["data"], r["contestant"]) == (data, name)]
            cost, losses[name] = results["costs"][data][name], [r["loss"] for r in runs]
            pairs = zip(losses[name], losses[names[0]], strict=True)
            scores = ([r[key] for r in runs] for key in ("distance", "precision", "recall"))
            rows.append(
                [
                    name,
                    f"{cost['parameters'] / 1e6:.2f}",
                    f"{cost['multiply_adds'] / 1e6:.0f}",
                    f"{cost['milliseconds']:.0f}",
                    f"{cost['kept_megabytes']:.0f}",
                    _spread(losses[name]),
                    _spread([a - b for a, b in pairs]) if name != names[0] else "-",
                    *(_spread(values) for values in scores),
                ]
            )
        real = [f"{floor[key]:.3g}" for key in ("distance", "precision", "recall")]
        rows.append(["held-out real images", *["-"] * 6, *real])
        lines += ["", f"{title}:", "", *_markdown(["contestant", *titles], rows)]
    return lines


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.1g}"


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _spell(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
