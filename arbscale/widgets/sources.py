"""What the explorer shows: images that can be rendered at any size, window by window.

A source has a `base` (the size that scale 1 stands for) and `render(size, window)`, which returns
(3, height, width) in [-1, 1] on the CPU.
"""

from __future__ import annotations

import io
import math
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.autoencoder import FirstStage
from arbscale.coords import Size, Window, scaled_size
from arbscale.model import ArbitraryScaleModel, Progress
from arbscale.samplers import Callback, Sampling, streams
from arbscale.store import InputError
from arbscale.tiles import Tile, cubic, paste, reduction

MAX_PHOTO = 24_000_000  # pixels of a photograph as it is decoded for the explorer
MAX_TRUTH = 1_024  # longer side of the original that is kept beside a reduced photograph
STRIP = 1 << 19  # pixels rendered at a time when a whole image is saved


class Source(Protocol):
    """An image of any size."""

    base: Size

    def render(self, size: Size, window: Window) -> Tensor:
        """Return a window of the image at `size`, (3, height, width) in [-1, 1]."""
        ...


class Painted:
    """Features (1, C, h, w) under a first stage's head."""

    def __init__(self, first_stage: FirstStage, features: Tensor, base: Size):
        self.first_stage, self.features, self.base = first_stage, features, base

    @classmethod
    @torch.no_grad()
    def of(cls, first_stage: FirstStage, z: Tensor, base: Size) -> Painted:
        """Decode an unscaled latent (1, c, h, w) once, to be rendered often."""
        return cls(first_stage, first_stage.features(z), base)

    @torch.no_grad()
    def render(self, size: Size, window: Window) -> Tensor:
        """Render the window alone."""
        return self.first_stage.render(self.features, size, window)[0].clamp(-1, 1).cpu()


class Enlarged:
    """A photograph (3, h, w) under super-resolution, from its latent (1, c, h', w').

    As `model.paint`, but for a window: what makes a tile agree with the input is computed once, at
    the training's scale, in place of anew at every size. The two differ by about a grey level.
    """

    def __init__(self, model: ArbitraryScaleModel, low: Tensor, z: Tensor):
        self.model, self.low, self.z = model, low, z
        self.base: Size = (low.shape[-2], low.shape[-1])
        self._tiles: dict[Tile, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def render(self, size: Size, window: Window) -> Tensor:
        """Render the window alone, from the tiles that it meets."""
        if (n := reduction(size, self.base)) > 1:  # as `tiles.bands` does
            larger = self.render((n * size[0], n * size[1]), tuple(n * x for x in window))
            return F.avg_pool2d(larger[None], n)[0]
        out = torch.zeros(3, *window[2:])
        for tile in self.model.tiles(self.base):
            place, y, x, cells = tile.axes(self.base, size, window)
            if len(y) and len(x):
                paste(out, self._paint(tile, size, y, x, cells), place, y, x, tile)
        return out

    def _paint(self, tile: Tile, size: Size, y: Tensor, x: Tensor, cells: Tensor) -> Tensor:
        """Return a tile's colours (3, rows, columns); the rest is as `tile.axes` gives it."""
        features, correction = self.decoded(tile)
        places = (part.to(features) for part in (y, x, cells[None]))
        rgb = self.model.first_stage.liif.query_grid(features, *places)[0].cpu()
        h, w = correction.shape[-2:]
        rgb = rgb + _sampled(correction, (y + 1) * (h / 2), (x + 1) * (w / 2))
        return rgb.clamp(-1, 1)

    def decoded(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return a tile's features and its back-projection (3, h, w), computed once."""
        if tile not in self._tiles:
            stage, low = self.model.first_stage, tile.cut(self.low)
            features = stage.features(self.z[tile.latent(self.model.zoom)])
            factor = self.model.preset.image_size / self.model.preset.low_size
            size = round(low.shape[-2] * factor), round(low.shape[-1] * factor)
            rgb = stage.render(features, size)[0].cpu()
            first = low - bicubic(rgb, (low.shape[-2], low.shape[-1]))
            second = low - bicubic(rgb + bicubic(first, size), (low.shape[-2], low.shape[-1]))
            self._tiles[tile] = features, first + second
        return self._tiles[tile]


class Resized:
    """An image (3, H, W) in [-1, 1], resized by antialiased bicubic, or by nearest neighbour."""

    def __init__(self, image: Tensor, nearest: bool = False):
        self.image, self.nearest = image, nearest
        self.base: Size = (image.shape[-2], image.shape[-1])

    def render(self, size: Size, window: Window) -> Tensor:
        """Resize what the window shows."""
        if not self.nearest:
            return bicubic(self.image, size, window).clamp(-1, 1)
        axes = zip(window[:2], window[2:], self.base, size, strict=True)
        rows, columns = (
            ((torch.arange(start, start + n) + 0.5) * (m / total)).long().clamp(max=m - 1)
            for start, n, m, total in axes
        )
        return self.image[:, rows][:, :, columns]


class OwnOutput(Resized):
    """Another source's output at one size, resized; it is rendered when it is first asked for."""

    def __init__(self, source: Source, size: Size, nearest: bool = False):
        self.source, self.base, self.nearest = source, size, nearest

    @cached_property
    def image(self) -> Tensor:
        """What is resized."""
        return self.source.render(self.base, (0, 0, *self.base))


def as_source(given: Any) -> Source:
    """Take an image (PIL, array or tensor) as one to resize; a function (size, window) renders.

    The function returns (3, height, width), or a batch of one, as `render_scenes` does.
    """
    from arbscale.data import to_tensor

    if callable(given):

        def render(size: Size, window: Window) -> Tensor:
            return given(size, window).reshape(3, *window[2:]).clamp(-1, 1).cpu()

        return SimpleNamespace(base=(1, 1), render=render)
    return Resized(fitted(to_tensor(given).cpu(), 4 * MAX_TRUTH))


def bicubic(image: Tensor, size: Size, window: Window | None = None) -> Tensor:
    """Resize (3, h, w) as `data.resize`, unclamped: antialiased, a = -0.5, or a window of it."""
    top, left, height, width = window or (0, 0, *size)
    steps = [n / total for n, total in zip(image.shape[-2:], size, strict=True)]
    spans = (top, top + height), (left, left + width)
    y, x = (
        (torch.arange(*span, dtype=torch.float64) + 0.5) * step
        for span, step in zip(spans, steps, strict=True)
    )
    return _sampled(image, y, x, *(max(1.0, step) for step in steps))


def _sampled(image: Tensor, y: Tensor, x: Tensor, tall: float = 1.0, wide: float = 1.0) -> Tensor:
    """Filter (3, h, w) at centres y and x, in its pixels, with cubics so many times as large."""
    (top, bottom), (left, right) = (
        (max(0, math.floor(float(at.min()) - 2 * shrink)), math.ceil(float(at.max()) + 2 * shrink))
        for at, shrink in ((y, tall), (x, wide))
    )
    rows = cubic(image[:, top:bottom, left:right], y, tall, top)  # of what is needed alone
    return cubic(rows.mT, x, wide, left).mT  # (3, len(y), len(x))


# Latents ------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Go `share` of the way from noise `a` to noise `b` on the great circle between them.

    A straight line would pass through noise that is too weak, which no sampler was trained on.
    """
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if share == 0 or angle < 1e-4:
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


@torch.no_grad()
def mixed_latent(
    model: ArbitraryScaleModel,
    seeds: tuple[int, int],
    share: float = 0.0,
    steps: int = Sampling.steps,
    sampler: str = Sampling.sampler,
    grid: Size | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw a latent (1, c, h, w) between two seeds: `model.sample` of the first at `share` 0.

    The noise is interpolated, not the latents: each value between is a sample of its own, where a
    mean of two latents is a double exposure.
    """
    ends = [model.start_noise(1, grid, Sampling(seed=seed).generator()) for seed in seeds]
    first, second = map(streams, ends)

    def drawn(t: int) -> Tensor:
        return slerp(first(t), second(t), share)

    sampling, start = Sampling(steps, sampler, seeds[0]), slerp(*ends, share)
    return model._sample(model.denoise(guidance=None), start, sampling, callback, drawn=drawn)


@torch.no_grad()
def enlarge(
    model: ArbitraryScaleModel, low: Tensor, sampling: Sampling, progress: Progress
) -> Enlarged:
    """Sample the latent of a photograph (3, h, w), and decode it, tile by tile."""
    spans = model.tiles((low.shape[-2], low.shape[-1]))
    total = (sampling.steps + 1) * len(spans)
    z = model._sample_tiles(low, spans, sampling, lambda done, _: progress(done, total))
    source = Enlarged(model, low, z)
    for done, tile in enumerate(spans, sampling.steps * len(spans) + 1):
        source.decoded(tile)
        progress(done, total)
    return source


# Photographs --------------------------------------------------------------------------------------


def read_photo(content: bytes, name: str) -> Tensor:
    """Decode a file's bytes as `load_image` does, with the refusals of `check`: (3, H, W).

    A large JPEG is decoded at a fraction of its size. Raises ValueError with the file's name.
    """
    from arbscale.data.images import open_image, reason, to_tensor

    name = Path(name.replace("\\", "/")).name[-80:] or "file"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo"
        path.write_bytes(content)
        try:
            with open_image(path) as image:
                image.draft("RGB", (2 * MAX_TRUTH,) * 2)
                if image.width * image.height > MAX_PHOTO:
                    raise InputError(f"over {MAX_PHOTO // 10**6} million pixels; reduce it")
                return to_tensor(image)
        except ValueError as error:
            raise InputError(f"{name}: {reason(error.__cause__ or error)}") from None


@dataclass(frozen=True)
class Photo:
    """A photograph (3, h, w) to enlarge, and its original if that had to be reduced."""

    low: Tensor
    truth: Tensor | None
    name: str
    extra: dict[str, tuple[str, Source]] = field(default_factory=dict)  # given to compare it with

    @classmethod
    def reduced(cls, image: Tensor, name: str, limit: int) -> Photo:
        """Reduce an image so that no side is over `limit`; keep up to `MAX_TRUTH` of it."""
        low = fitted(image, limit)
        return cls(low, None if low is image else fitted(image, MAX_TRUTH), name)

    @property
    def note(self) -> str:
        """What it is, in words."""
        note = f"{self.name}: {self.low.shape[-2]} x {self.low.shape[-1]} px"
        return note if self.truth is None else f"{note}, reduced; the original is the ground truth"


def fitted(image: Tensor, limit: int) -> Tensor:
    """Reduce an image (3, H, W) so that no side is over `limit`."""
    from arbscale.data import resize

    height, width = image.shape[-2:]
    factor = limit / max(height, width)
    return image if factor >= 1 else resize(image, scaled_size((height, width), factor))


# Files --------------------------------------------------------------------------------------------


def encoded(image: Tensor, draft: bool = False) -> bytes:
    """Return (3, H, W) in [-1, 1] as a PNG file, packed fast, or a draft as a JPEG, much faster."""
    from arbscale.data import to_pil

    buffer = io.BytesIO()
    how = {"format": "jpeg", "quality": 95} if draft else {"format": "png", "compress_level": 1}
    to_pil(image).save(buffer, **how)
    return buffer.getvalue()


def rendered_png(source: Source, size: Size, window: Window, progress: Progress) -> bytes:
    """Render a window, strip by strip in 8 bits, as a PNG file."""
    from PIL import Image

    from arbscale.data import to_uint8

    out = np.empty((window[2], window[3], 3), "uint8")
    step = max(1, STRIP // window[3])
    for start in range(0, window[2], step):
        stop = min(start + step, window[2])
        strip = source.render(size, (window[0] + start, window[1], stop - start, window[3]))
        out[start:stop] = to_uint8(strip).permute(1, 2, 0).numpy()
        progress(stop, window[2])
    buffer = io.BytesIO()
    Image.fromarray(out).save(buffer, "png")
    return buffer.getvalue()
