"""Reports as markdown tables, one writer for each task."""

from __future__ import annotations

import math
import statistics

METRICS = {"psnr": ("PSNR (dB)", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
SCORES = ("distance", "precision", "recall")
RATIO = "times as fast"


def table(report: dict) -> str:
    """Return a report as markdown: one line that says what it is, the table, the command."""
    report = finite(report)
    writers = {"generate": _generation, "steps": _steps, "bench": _speed}
    writers |= {"ablate": _ablation, "heads": _heads, "alignment": _alignment}
    body = writers.get(report["task"], _pairs)(report)
    reasons = [f"{place}: {why}." for place, why in report.get("null", {}).items()]
    parts = [[_caption(report)], body, reasons, [f"Measured by `{report['command']}`."]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def finite(report: dict) -> dict:
    """Return a report whose numbers are finite or None; its `null` has the reasons by place."""
    reasons: dict[str, str] = {}

    def walk(value: object, place: str) -> object:
        if isinstance(value, dict):
            return {key: walk(x, f"{place}{key}, ") for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(x, f"{place}{i}, ") for i, x in enumerate(value)]
        if not isinstance(value, float) or math.isfinite(value):
            return value
        place = place.removesuffix(", ")
        why = "not a number" if math.isnan(value) else "infinite"
        identical = place.endswith("psnr") and value > 0
        reasons[place] = f"{why}: an image is identical to its reference" if identical else why
        return None

    found = {**report, "results": walk(report["results"], "")}
    return {**found, "null": reasons} if reasons else report


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
    if report["task"] != "steps" and (sampling := protocol.get("sampling")):
        facts.append("{sampler}, {steps} steps, seed {seed}".format(**sampling))
        if (guidance := sampling.get("guidance")) is not None:
            facts.append(f"guidance {guidance:g}")
    facts.append(f"{machine['device']}, threads: {machine['threads']}")
    return "; ".join(facts) + ":"


def _pairs(report: dict) -> list[str]:
    """One row per scale and method."""
    names = [name for name in METRICS if name != "lpips" or report["protocol"]["lpips"]]
    rows = [
        [f"x{scale}", method, *(_number(values[name], METRICS[name][1]) for name in names)]
        for scale, methods in report["results"].items()
        for method, values in methods.items()
    ]
    return _markdown(["scale", "method", *(METRICS[name][0] for name in names)], rows)


def _generation(report: dict) -> list[str]:
    """Distances by size and method; then SelfSSIM's matrices, the patches, and the neighbours."""
    protocol, results = report["protocol"], report["results"]
    inception = protocol["features"] == "inception"
    title = _distance_title(protocol)
    rows = [
        [
            _spell(row["size"]),
            row["method"],
            row["pictures"],
            _distance(row),
            *(f"{row[name]:.3f} ± {_number(row[name + '_pm'], '.3f')}" for name in SCORES[1:]),
        ]
        for row in results["rows"]
    ]
    over, neighbours = protocol["distance over"], protocol["precision and recall over"]
    networks = f"Distance over {over}; precision and recall over {neighbours}"
    if neighbours.startswith(over):
        networks = f"Distance, precision and recall over {neighbours}"
    lines = [
        f"{networks}; {_against(protocol)}",
        "",
        *_markdown(["size", "method", "images", title, "precision", "recall"], rows),
    ]
    if consistency := results["self_ssim"]:
        lines += ["", *_matrices(consistency)]
    if patches := results["patches"]:
        kind = "Patch FID" if inception else f"Patch distance ({title}; not an FID)"
        low, high = patches["sizes"]
        lines += [
            "",
            f"{kind}: {_number(patches['distance'], '.4g')} over {patches['patches']} patches of "
            f"{patches['side']} px at sizes from {low} to {high}.",
        ]
    if near := results.get("neighbours"):
        columns = ["images", *(f"{100 * level:.0f} %" for level in near["levels"])]
        methods = {name: near[name] for name in near if name not in ("pictures", "levels")}
        rows = [[name, *(_number(x, ".3g") for x in row)] for name, row in methods.items()]
        told = f"Distance to the nearest of {near['pictures']} training images, quantiles:"
        lines += ["", told, "", *_markdown(columns, rows)]
    return lines


def _matrices(consistency: dict) -> list[str]:
    sizes = [_spell(size) for size in consistency["sizes"]]
    rows = [
        [method, variant, at, *(_number(x, ".4f") for x in values)]
        for method, variants in consistency.items()
        if isinstance(variants, dict)
        for variant, matrix in variants.items()
        for at, values in zip(sizes, matrix, strict=True)
    ]
    columns = ["method", "variant", "measured at", *(f"against {size}" for size in sizes)]
    return [f"SelfSSIM over {consistency['pictures']} images:", "", *_markdown(columns, rows)]


def _steps(report: dict) -> list[str]:
    """One row per sampler and number of steps, and one for the ceiling."""
    protocol, results = report["protocol"], report["results"]
    rows = [
        [row["sampler"], row["steps"], f"{row['seconds']:.3g}", _distance(row)]
        for row in results["rows"]
    ]
    if ceiling := results.get("ceiling"):
        rows.append(["first stage of other real images (ceiling)", "-", "-", _distance(ceiling)])
    titles = ["sampler", "steps", "seconds per latent", _distance_title(protocol)]
    return [
        f"Size {_spell(protocol['sizes'][0])}. Distance over {protocol['distance over']}; "
        f"{_against(protocol)}",
        "",
        *_markdown(titles, rows),
    ]


def _speed(report: dict) -> list[str]:
    """One row per size and task."""
    compared = any(RATIO in row for row in report["results"])
    peak = report["protocol"].get("peak gigaflops")
    rows = [
        [
            _spell(row["size"]),
            row["task"],
            f"{row['images_per_second']:.4g}",
            f"{1000 * row['seconds']:.4g}",
            f"{1000 * row['spread']:.2g}" if row["repeats"] > 1 else "-",
            row["repeats"],
            "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
            *([f"{row[RATIO]:.3g}" if RATIO in row else "-"] if compared else []),
            *([f"{row['gigaflops']:.3g}" if "gigaflops" in row else "-"] if peak else []),
        ]
        for row in report["results"]
    ]
    titles = ["images per second", "ms per call", "interquartile range, ms", "calls"]
    titles += ["peak memory, MB"]
    titles += [RATIO + " as the released form"] if compared else []
    titles += [f"GFLOP/s (large matrix product: {peak:.3g})"] if peak else []
    batch = f"Batch {report['protocol']['batch']}, {report['protocol']['precision']}."
    lines = [batch, "", *_markdown(["size", "task", *titles], rows)]
    if enlarging := report.get("enlarging"):
        lines += ["", "Two photographs of scikit-image, enlarged x2:", "", *_enlarging(enlarging)]
    return lines


def _enlarging(rows: list[dict]) -> list[str]:
    """One row per way to enlarge: its time and its scores."""
    scores = {name: about for name, about in METRICS.items() if name in rows[0]}
    titles = ["steps", "precision", "tile", "seconds per megapixel"]
    cells = [
        [
            row["steps"],
            row["precision"],
            f"{row['tile']} px" if row["tile"] else "largest",
            f"{row['seconds a megapixel']:.3g}",
            *(_number(row[name], form) for name, (_, form) in scores.items()),
        ]
        for row in rows
    ]
    return _markdown([*titles, *(title for title, _ in scores.values())], cells)


def _heads(report: dict) -> list[str]:
    """One row per head: what it costs, then PSNR and LPIPS by scale."""
    results = report["results"]
    first = next(iter(results.values()))
    titles = ["head", "parameters", "steps", *(f"{side} px, ms" for side in first["ms"])]
    titles += [*(f"x{scale}, dB and LPIPS" for scale in first["scores"]), "seam (ground truth)"]
    rows = [
        [
            name,
            head["parameters"],
            report["protocol"]["steps"][name],
            *(f"{ms:.3g}" for ms in head["ms"].values()),
            *(f"{x['psnr']:.2f}, {x['lpips']:.4f}" for x in head["scores"].values()),
            "{ours:.3f} ({ground truth:.3f})".format(**head["seam"]),
        ]
        for name, head in results.items()
    ]
    told = "Decoder and head trained on a frozen encoder, all on the same images and points:"
    return [told, "", *_markdown(titles, rows)]


def _alignment(report: dict) -> list[str]:
    """One row per run: by how many percent its image errors differ from those before."""
    before, *runs = ((name, row["image"]) for name, row in report["results"].items())
    rows = [
        [name, *(f"{100 * (x / y - 1):+.2f}" for x, y in zip(errors, before[1], strict=True))]
        for name, errors in runs
    ]
    told = f"Change of the image error after {report['protocol']['steps']} steps, in percent:"
    return [told, "", *_markdown(["run", *(f"t = {t}" for t in report["protocol"]["times"])], rows)]


def _ablation(report: dict) -> list[str]:
    """One table per comparison; one row per contestant, the mean and deviation over its seeds."""
    protocol, results = report["protocol"], report["results"]
    titles = ["contestant", "parameters, M", "multiply-adds, M", "ms per step", "for backward, MB"]
    titles += ["held-out loss", "difference from the first", protocol["features"] + " distance"]
    titles += SCORES[1:]
    lines = [
        f"{protocol['steps']} steps, {protocol['seeds']} seeds, mean ± deviation over them. Loss: "
        f"{protocol['held-out loss']}. Distance over {protocol['distance over']}; "
        f"{protocol['drawn by']}.",
    ]
    for title, (data, names) in protocol["comparisons"].items():
        of_data, rows = [run for run in results["runs"] if run["data"] == data], []
        runs = {name: [run for run in of_data if run["contestant"] == name] for name in names}
        for name in names:
            cost, losses = results["costs"][data][name], [run["loss"] for run in runs[name]]
            pairs = zip(losses, [run["loss"] for run in runs[names[0]]], strict=True)
            steps = [None if None in ab else ab[0] - ab[1] for ab in pairs]
            rows.append(
                [
                    name,
                    f"{cost['parameters'] / 1e6:.2f}",
                    f"{cost['multiply_adds'] / 1e6:.0f}",
                    f"{cost['milliseconds']:.0f}",
                    f"{cost['kept_megabytes']:.0f}",
                    spread(losses),
                    spread(steps) if name != names[0] else "-",
                    *(spread([run[key] for run in runs[name]]) for key in SCORES),
                ]
            )
        real = [_number(results["floors"][data][key], ".3g") for key in SCORES]
        rows.append(["held-out real images", *["-"] * 6, *real])
        lines += ["", f"{title}:", "", *_markdown(titles, rows)]
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _distance_title(protocol: dict) -> str:
    """Return what the distance is called: FID over Inception's features only."""
    named = protocol["features"]
    return "FID" if named == "inception" else f"Fréchet distance, {named} features"


def _against(protocol: dict) -> str:
    return (
        f"against {protocol['reference']} real images ({protocol['real pictures']}); "
        f"± is {protocol['interval']}."
    )


def _distance(row: dict) -> str:
    return f"{_number(row['distance'], '.4g')} ± {_number(row['distance_pm'], '.2g')}"


def spread(values: list[float | None]) -> str:
    """Return mean and deviation, both to the second digit of the deviation."""
    if None in values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3g}"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    if not deviation:
        return f"{mean:.3g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _markdown(columns: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, x)) + " |" for x in (columns, ["---"] * len(columns), *rows)]


def _spell(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"
