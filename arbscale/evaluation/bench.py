"""Speed: a model end to end, and ways to render from the same features up to large images."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale import store
from arbscale.coords import Size, cell, check_size, grid
from arbscale.data import low_high_pair, open_dataset
from arbscale.evaluation.pairs import eight_bits, lpips_or_why_not, score
from arbscale.evaluation.reports import header
from arbscale.evaluation.tables import METRICS, RATIO
from arbscale.liif import LIIF, InterpolatedLIIF
from arbscale.model import BAND, ArbitraryScaleModel
from arbscale.store import StateError
from arbscale.unet import pick_precision

CPU = torch.device("cpu")
AGREEMENT = 1e-4  # largest difference of two forms' images
STEPS = (1, 2, 3, 5)  # that `upscale` is timed in
LATENT = (64, 64)  # that all forms render from
SIDES = (256, 512, 1024)  # pixels; all forms render these
LARGER = (2048, 4096, 8192, 16384)  # the last form renders these, band by band
YARDSTICK = "render, released form, 4 x 256"


@dataclass(frozen=True)
class Speed:
    """What `images_per_second` measured."""

    images_per_second: float  # at the median
    seconds: float  # per call, median
    spread: float  # seconds between the first and the third quartile
    repeats: int  # calls that were timed, or blocks of short ones
    peak_megabytes: float | None  # of memory: the device's allocator, or the process on Linux


def images_per_second(
    function: Callable[[], object],
    batch: int = 1,
    seconds: float = 1.0,
    device: torch.device = CPU,
) -> Speed:
    """Time a call that makes `batch` images on a device, by `torch.utils.benchmark`.

    The first calls warm up and are not counted; then calls are timed, short ones in blocks, until
    `seconds` have passed, at least one, with the GPU's queue emptied around each.
    """
    timer = _benchmark().Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    _reset_peak(device)
    found = timer.blocked_autorange(min_run_time=seconds)
    return Speed(batch / found.median, found.median, found.iqr, len(found.times), _peak(device))


@torch.no_grad()
def measure(
    model: ArbitraryScaleModel,
    sizes: Iterable[int | Size],
    batch: int = 1,
    steps: int = 20,
    seconds: float = 1.0,
) -> dict:
    """Time a model at several sizes; JSON-able, with the protocol beside the results.

    Rows are named tasks: the model end to end; the same with the 200 DDIM steps of the published
    code, at the first size alone, for it does not depend on the size; and decoding alone. Then come
    the forms of rendering of `_forms`, one image from 64 x 64 features, each with how many times as
    fast as the released form it is, and with the operations per second of its matrix products; the
    protocol has those of a large product alone, the peak. For super-resolution, `enlarging` has
    `upscale` of photographs, by steps and precision.
    """
    rows = []
    _reset_peak(model.device)
    start = _peak(model.device)
    for i, size in enumerate(map(check_size, sizes)):
        shape = batch, model.preset.latent_channels, *model.latent_grid(size)
        z = _seeded(torch.randn, *shape).to(model.device)
        tasks = {"decoding alone": partial(model.first_stage.decode, z, size)}
        for sampler, n in [("dpm_solver_pp", steps), ("ddim", 200)][: 2 if i == 0 else 1]:
            tasks[f"end to end, {sampler}, {n} steps"] = _whole(model, size, batch, n, sampler)
        for name, task in tasks.items():
            speed = images_per_second(task, batch, seconds, model.device)
            rows.append({"size": list(size), "task": name, **asdict(speed)})
    forms = _forms(model)
    for side in SIDES:
        for name, form in forms.items():
            task = partial(form, (side, side))
            speed = images_per_second(task, 1, seconds, model.device)
            if name == YARDSTICK:  # the first
                slowest = speed.seconds
            rows.append({"size": [side, side], "task": name, **asdict(speed)})
            rows[-1][RATIO] = slowest / speed.seconds
            rows[-1]["gigaflops"] = _operations(task) / speed.seconds / 1e9
    name, form = list(forms.items())[-1]
    for side in LARGER:
        speed = _once(lambda n=side: _in_bands(form, (n, n)), model.device)
        rows.append({"size": [side, side], "task": name, **asdict(speed)})
    protocol = {
        "batch": batch,
        "steps": steps,
        "seconds a row": seconds,
        "warm-up": f"the first call of each row, up to {max(SIDES)} px",
        "precision": "float32",
        "megabytes before": start,
        "peak gigaflops": _peak_rate(model.device, seconds) / 1e9,
    }
    report = {**header(model, "bench", protocol), "results": rows}
    return report | ({"enlarging": _enlarging(model, seconds)} if model.preset.low_size else {})


def plot(report: dict, path: Path) -> None:
    """Draw a report as a PNG file: the forms' time and memory over the side of the output, log-log.

    For super-resolution, its scores over the time of enlarging are drawn beside them.
    """
    import matplotlib.pyplot as plt

    enlarging = report.get("enlarging", [{}])
    scores = [key for key in ("psnr", "lpips") if key in enlarging[0]]
    columns = 2 + len(scores)
    figure, places = plt.subplots(1, columns, figsize=(5 * columns, 4), layout="constrained")
    left, right = places[:2]
    rows = [row for row in report["results"] if row["task"].startswith("render, ")]
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == name]
        sides = [row["size"][0] for row in own]
        left.loglog(sides, [row["seconds"] for row in own], "o-", label=name[len("render, ") :])
        if own[0]["peak_megabytes"] is not None:
            before = report["protocol"]["megabytes before"]
            peaks = [max(1, row["peak_megabytes"] - before) for row in own]
            right.loglog(sides, peaks, "o-")
    for axes, title in (
        (left, "seconds per image"),
        (right, "megabytes, beyond those at the start"),
    ):
        axes.set(title=title, xlabel="side of the image in pixels")
        axes.set_xticks([*SIDES, *LARGER], [f"{n:,}" for n in (*SIDES, *LARGER)], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=9)
    for place, key in zip(places[2:], scores, strict=True):
        _plot_enlarging(place, enlarging, key)
    with store.replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=110)
    plt.close(figure)


def _plot_enlarging(axes: Any, rows: list[dict], key: str) -> None:
    """Draw a score over the time of enlarging; each point says its number of steps."""
    rows = [row for row in rows if row["tile"] is None]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        x, y = ([row[name] for row in own] for name in ("seconds a megapixel", key))
        axes.plot(x, y, "o-", label=precision)
        for row, *point in zip(own, x, y, strict=True):
            axes.annotate(f" {row['steps']}", point)
    title = f"{METRICS[key][0]} of photographs enlarged x2, by steps"
    axes.set(title=title, xlabel="seconds per megapixel of output")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _whole(
    model: ArbitraryScaleModel, size: Size, batch: int, steps: int, sampler: str
) -> Callable[[], Tensor]:
    """Return a call that makes `batch` images from nothing, or from small photographs."""
    if not model.preset.low_size:
        return lambda: model.generate(batch, size, 0, steps, sampler)
    low = _seeded(torch.rand, batch, 3, model.preset.low_size, model.preset.low_size) * 2 - 1
    return lambda: model.upscale(low, size=size, steps=steps, sampler=sampler)


def _enlarging(model: ArbitraryScaleModel, seconds: float) -> list[dict]:
    """Time `upscale` x2 of scikit-image's validation photographs, and score what it makes.

    First come five steps in tiles of twice the training's size. PSNR is of Y without a border of 2.
    """
    pairs = [low_high_pair(image, 2) for image in open_dataset("photos", "val")]
    megapixels = sum(math.prod(high.shape[-2:]) for _, high in pairs) / 1e6
    fast = pick_precision("auto", model.device) != torch.float32
    ways = [("auto" if auto else "float32", n, None) for auto in range(1 + fast) for n in STEPS]
    with_lpips, rows = lpips_or_why_not(), []
    for precision, steps, tile in [("float32", 5, 2 * model.preset.low_size), *ways]:
        options = {"steps": steps, "precision": precision, "tile": tile}
        made: list[Tensor] = []

        def task(options: dict = options, made: list = made) -> None:
            made[:] = [model.upscale(eight_bits(low), 2, **options) for low, _ in pairs]

        speed = images_per_second(task, len(pairs), seconds, model.device)
        scores = [
            score({"truth": high[None], "ours": image[None]}, "y", 2, with_lpips)["ours"]
            for image, (_, high) in zip(made, pairs, strict=True)
        ]
        means = {key: statistics.mean(x[key] for x in scores) for key in scores[0]}
        told = options | {"precision": "bfloat16" if precision == "auto" else precision}
        rows.append({**told, "seconds a megapixel": speed.seconds / megapixels, **means})
    return rows


def _forms(model: ArbitraryScaleModel) -> dict[str, Callable[..., Tensor]]:
    """Return forms that render an image of a size, or a window of it, by name.

    First the arithmetic of the released code at the paper's size; then the exact form of the same
    LIIF, and heads as wide as the model's, without training: the exact form of LIIF, and the
    interpolated head, by points, on one thread and as it renders. RuntimeError where two forms of
    the same head disagree.
    """
    hidden, width = model.preset.hidden, model.first_stage.liif.in_channels
    paper = LIIF(128).to(model.device)
    exact = LIIF(width, hidden).to(model.device)
    ours = InterpolatedLIIF(width, hidden, finer=2).to(model.device)
    wide, own = (_seeded(torch.randn, 1, n, *LATENT).to(model.device) for n in (128, width))
    layers = f"{len(hidden)} x {hidden[0]}"

    def by_points(size: Size) -> Tensor:
        coords, cells = grid(size, device=own.device).view(1, -1, 2), cell(size, own.device)
        return ours.query(own, coords, cells[None]).mT.reshape(1, 3, *size)

    def one_thread(size: Size) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return ours.render(own, size)
        finally:
            torch.set_num_threads(before)

    forms = {
        YARDSTICK: lambda size: naive_render(paper, wide, size),
        "render, exact LIIF, 4 x 256": lambda size: paper.render(wide, size),
        f"render, exact LIIF, {layers}": lambda size: exact.render(own, size),
        f"render, interpolated, {layers}, by points": by_points,
        f"render, interpolated, {layers}, one thread": one_thread,
        f"render, interpolated, {layers}": lambda *window: ours.render(own, *window),
    }
    released, same, _, points, _, dense = (form((48, 80)) for form in forms.values())
    if max((released - same).abs().max(), (points - dense).abs().max()) > AGREEMENT:
        raise StateError("two forms of the same head disagree; one of them is broken")
    return forms


def _in_bands(form: Callable[..., Tensor], size: Size) -> None:
    """Render an image as for a file, without one."""
    step = max(1, BAND // size[1])
    for top in range(0, size[0], step):
        form(size, (top, 0, min(step, size[0] - top), size[1]))


def _once(function: Callable[[], object], device: torch.device) -> Speed:
    """Time a call that needs no second one."""
    clock = _benchmark().timer  # waits until the GPU's queue is empty
    _reset_peak(device)
    start = clock()
    function()
    seconds = clock() - start
    return Speed(1 / seconds, seconds, 0.0, 1, _peak(device))


def _operations(function: Callable[[], object]) -> int:
    """Count the operations of a call's matrix products and convolutions: two per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _peak_rate(device: torch.device, seconds: float) -> float:
    """Return the operations per second of a large float32 matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a = _seeded(torch.randn, side, side).to(device)
    return 2 * side**3 / images_per_second(lambda: a @ a, 1, seconds, device).seconds


def _seeded(draw: Callable[..., Tensor], *shape: int) -> Tensor:
    return draw(shape, generator=torch.Generator().manual_seed(0))


def naive_render(liif: LIIF, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Render (1, C, h, w) the usual way: four `grid_sample`s, concatenate, the MLP on every row."""
    h, w = features.shape[-2:]
    device, sides = features.device, features.new_tensor([h, w])
    coords = grid(size, device=device).view(1, -1, 2)  # (1, N, 2)
    centres = grid((h, w), device=device).permute(2, 0, 1)[None]  # (1, 2, h, w)
    cells = (cell(size, device) * sides).expand(1, coords.shape[1], 2)
    answers, areas = [], []
    for dy in (-1, 1):
        for dx in (-1, 1):
            step = features.new_tensor([dy / h, dx / w]) + 1e-6
            shifted = (coords + step).clamp(-1 + 1e-6, 1 - 1e-6)
            where = shifted.flip(-1)[:, None]  # grid_sample wants (x, y)
            look = [
                F.grid_sample(x, where, mode="nearest", align_corners=False)[:, :, 0].mT
                for x in (features, centres)
            ]
            offset = (coords - look[1]) * sides
            hidden = torch.cat([look[0], offset, cells], dim=-1)  # (1, N, C + 4)
            for layer in liif.layers[:-1]:
                hidden = layer(hidden).relu()
            answers.append(liif.layers[-1](hidden))
            areas.append(offset.prod(-1, keepdim=True).abs() + 1e-9)
    rgb = sum(a * b for a, b in zip(answers, areas[::-1], strict=True)) / sum(areas)
    return rgb.mT.reshape(1, 3, *size)


def _benchmark() -> Any:
    """Import torch's timers, which warn of a CUDA compiler without a GPU: not needed here."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from torch.utils import benchmark
    finally:
        log.setLevel(level)
    return benchmark


def _reset_peak(device: torch.device) -> None:
    """Forget the highest memory use so far, where the system can."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def _peak(device: torch.device) -> float | None:
    """Return the highest memory use since `_reset_peak` in megabytes, or None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.is_file():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
