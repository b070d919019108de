"""Where pixels are: the one place that states the coordinate convention.

An image covers the square [-1, 1] x [-1, 1] whatever its size. Coordinates come as (y, x), y down.
Pixel i of n has its centre at `-1 + (2 i + 1) / n` and a cell (its extent) of `2 / n`.
Sizes are `(height, width)`; a window is `(top, left, height, width)` in pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from arbscale.store import InputError

Size = tuple[int, int]
Window = tuple[int, int, int, int]


def check_size(size: int | Size) -> Size:
    """Return `size` as `(height, width)`; an integer means a square.

    Raises ValueError unless both are positive integers.
    """
    try:
        pair = tuple(index(n) for n in (size if isinstance(size, Sequence) else (size, size)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"a size is positive, such as 256 or (75, 100), got {size!r}")
    return pair


def check_window(window: Window | None, size: Size) -> Window:
    """Return `window`, or the whole image for None; ValueError if it leaves the image."""
    if window is None:
        return (0, 0, *size)
    top, left, height, width = window
    inside = 0 <= top <= top + height <= size[0] and 0 <= left <= left + width <= size[1]
    if not inside or height < 1 or width < 1:
        where = f"(top, left, height, width) = {tuple(window)}"
        raise InputError(f"window {where} does not lie in an image of {size[0]} x {size[1]}")
    return tuple(window)


def scaled_size(size: Size, scale: float) -> Size:
    """Return the output size `round(scale * size)`, at least one pixel a side.

    Raises ValueError unless `scale` is a positive finite number.
    """
    if not (math.isfinite(scale * max(size)) and scale > 0):
        raise InputError(f"a scale is a positive number such as 3.7, got {scale!r}")
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def same_area(side: int, ratio: Size) -> Size:
    """Return the size of that ratio, height to width, with about the area of a square."""
    stretch = math.sqrt(ratio[0] / ratio[1])
    return max(1, round(side * stretch)), max(1, round(side / stretch))


def pixel_centres(n: int, device: torch.device | None = None) -> Tensor:
    """Return the coordinates (n,) of n pixel centres along one axis, in [-1, 1]."""
    return (torch.arange(n, device=device) * 2 + 1) / n - 1


def grid(size: Size, window: Window | None = None, device: torch.device | None = None) -> Tensor:
    """Return the pixel centres (y, x) of an image or of a window of it, shape (H, W, 2)."""
    top, left, height, width = check_window(window, size)
    y = pixel_centres(size[0], device)[top : top + height]
    x = pixel_centres(size[1], device)[left : left + width]
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # (H, W, 2)


def cell(size: Size, device: torch.device | None = None) -> Tensor:
    """Return the extent (y, x) of one pixel of an image of `size`, shape (2,)."""
    return torch.tensor([2 / size[0], 2 / size[1]], device=device)
