"""Speed: images per second, end to end and for decoding alone, beside the usual forms."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import Size, cell, check_size, grid
from arbscale.evaluation.reports import header
from arbscale.liif import LIIF
from arbscale.model import ArbitraryScaleModel
from arbscale.store import StateError

CPU = torch.device("cpu")
AGREEMENT = 1e-4  # largest difference of the two decoders' images
PAPER_SIZE = (256, 256)  # of the images that a LIIF as large as the paper's renders


@dataclass(frozen=True)
class Speed:
    """What `images_per_second` measured."""

    images_per_second: float  # at the median
    seconds: float  # per call, median
    spread: float  # seconds between the first and the third quartile
    repeats: int  # calls that were timed
    peak_megabytes: float | None  # of memory: the device's allocator, or the process on Linux


def images_per_second(
    function: Callable[[], object],
    batch: int = 1,
    seconds: float = 1.0,
    device: torch.device = CPU,
) -> Speed:
    """Time a call that makes `batch` images on a device, by `torch.utils.benchmark`.

    The first call warms up and is not counted; then calls are timed one by one until `seconds`
    have passed, at least one, with the GPU's queue emptied around each.
    """
    timer = _timer_class()("f()", globals={"f": function}, num_threads=torch.get_num_threads())
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
    code, at the first size alone, for it does not depend on the size; decoding alone; and decoding
    with the usual form of LIIF, whose image is checked against ours (RuntimeError). Last come both
    forms of a LIIF as large as the paper's.
    """
    rows = []

    def time(size: Size, tasks: dict[str, Callable[[], Tensor]]) -> None:
        for name, task in tasks.items():
            speed = images_per_second(task, batch, seconds, model.device)
            rows.append({"size": list(size), "task": name, **asdict(speed)})

    for i, size in enumerate(map(check_size, sizes)):
        time(size, _decoders(model, size, batch))
        for sampler, n in [("dpm_solver_pp", steps), ("ddim", 200)][: 2 if i == 0 else 1]:
            whole = _whole(model, size, batch, n, sampler)
            time(size, {f"end to end, {sampler}, {n} steps": whole})
    time(PAPER_SIZE, _paper_liif(batch, model.device))
    protocol = {
        "batch": batch,
        "steps": steps,
        "seconds a row": seconds,
        "warm-up": "the first call of each row",
        "precision": "float32",
    }
    return {**header(model, "bench", protocol), "results": rows}


def _whole(
    model: ArbitraryScaleModel, size: Size, batch: int, steps: int, sampler: str
) -> Callable[[], Tensor]:
    """Return a call that makes `batch` images from nothing, or from small photographs."""
    if not model.preset.low_size:
        return lambda: model.generate(batch, size, 0, steps, sampler)
    low = _seeded(torch.rand, batch, 3, model.preset.low_size, model.preset.low_size) * 2 - 1
    return lambda: model.upscale(low, size=size, steps=steps, sampler=sampler)


def _decoders(
    model: ArbitraryScaleModel, size: Size, batch: int
) -> dict[str, Callable[[], Tensor]]:
    """Return calls that decode the same latents, by name."""
    grid_size, channels = model.latent_grid(size), model.preset.latent_channels
    z = _seeded(torch.randn, batch, channels, *grid_size).to(model.device)
    stage = model.first_stage

    def naive() -> Tensor:
        return _naive(stage.liif, stage.features(z), size)

    tasks = {"decoding alone": lambda: stage.decode(z, size)}
    if model.preset.local_ensemble and model.preset.cell_decode:  # what the usual form has
        if (naive() - stage.decode(z, size)).abs().max() > AGREEMENT:
            raise StateError("the two decoders disagree; one of them is broken")
        tasks["decoding alone, usual form of LIIF"] = naive
    return tasks


def _paper_liif(batch: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return calls that render `PAPER_SIZE` from 64 x 64 x 128 features, four layers of 256."""
    liif, size = LIIF(128, (256,) * 4).to(device), PAPER_SIZE
    features = _seeded(torch.randn, batch, 128, 64, 64).to(device)
    return {
        "render, LIIF of the paper": lambda: liif.render(features, size),
        "render, LIIF of the paper, usual form": lambda: _naive(liif, features, size),
    }


def _seeded(draw: Callable[..., Tensor], *shape: int) -> Tensor:
    return draw(shape, generator=torch.Generator().manual_seed(0))


def _naive(liif: LIIF, features: Tensor, size: Size) -> Tensor:
    return torch.cat([naive_render(liif, x[None], size) for x in features])


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


def _timer_class() -> type:
    """Import torch's timer, which warns of a CUDA compiler without a GPU: not needed here."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        log.setLevel(level)
    return Timer


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
