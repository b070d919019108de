"""Speed of rendering, side by side with the usual form, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import cell, grid
from arbscale.liif import LIIF

SIZE = (256, 256)  # rendered from 64 x 64 features


def naive_render(liif: LIIF, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Render (1, C, h, w) the usual way: four `grid_sample`s, concatenate, the MLP on every row."""
    h, w = features.shape[-2:]
    coords = grid(size).view(1, -1, 2)  # (1, N, 2)
    centres = grid((h, w)).permute(2, 0, 1)[None]  # (1, 2, h, w)
    cells = (cell(size) * torch.tensor([h, w])).expand(1, coords.shape[1], 2)
    answers, areas = [], []
    for dy in (-1, 1):
        for dx in (-1, 1):
            shifted = (coords + torch.tensor([dy / h, dx / w]) + 1e-6).clamp(-1 + 1e-6, 1 - 1e-6)
            where = shifted.flip(-1)[:, None]  # grid_sample wants (x, y)
            look = [
                F.grid_sample(x, where, mode="nearest", align_corners=False)[:, :, 0].mT
                for x in (features, centres)
            ]
            offset = (coords - look[1]) * torch.tensor([h, w])
            hidden = torch.cat([look[0], offset, cells], dim=-1)  # (1, N, C + 4)
            for layer in liif.layers[:-1]:
                hidden = layer(hidden).relu()
            answers.append(liif.layers[-1](hidden))
            areas.append(offset.prod(-1, keepdim=True).abs() + 1e-9)
    rgb = sum(a * b for a, b in zip(answers, areas[::-1], strict=True)) / sum(areas)
    return rgb.mT.reshape(1, 3, *size)


@torch.no_grad()
def compare(repeats: int = 5) -> list[tuple[str, float, float]]:
    """Time rendering `SIZE` from 64 x 64 x 128 features with 4 x 256 hidden, alternating.

    Returns (name, median seconds, spread in seconds) of each form; both give the same picture,
    which is checked first (RuntimeError).
    """
    torch.manual_seed(0)
    liif, features = LIIF(128), torch.randn(1, 128, 64, 64)
    forms: dict[str, Callable[[], Tensor]] = {
        "naive (grid_sample x 4, concatenate, MLP on every row)": lambda: naive_render(
            liif, features, SIZE
        ),
        "LIIF.render": lambda: liif.render(features, SIZE),
    }
    pictures = [form() for form in forms.values()]  # also the warm-up
    if (pictures[0] - pictures[1]).abs().max() > 1e-5:
        raise RuntimeError("the two forms disagree; one of them is broken")
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - started)
    return [(name, statistics.median(t), max(t) - min(t)) for name, t in times.items()]
