"""Overlapping tiles: networks that see a tile at a time, and images without seams.

Tiles are cut in the input. The denoiser's outputs on them are blended at every step, from noise
that does not depend on how the image is cut. Their decoded pixels are laid over those of the
neighbours with a linear ramp across the overlap. Then the image is corrected so that it agrees with
the input: as a whole, because a tile's window of whole output pixels covers a slightly different
area than the tile itself.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.autoencoder import FirstStage
from arbscale.coords import Size, Window
from arbscale.diffusion import Denoiser
from arbscale.liif import LIIF, InterpolatedLIIF
from arbscale.store import InputError
from arbscale.unet import computing

Place = tuple[EllipsisType, slice, slice]
"""Which rows and columns of a tensor (..., h, w) something is."""

Axes = tuple[Window, Tensor, Tensor, Tensor]
"""A tile's place in an image or a window, the coordinates in [-1, 1] of the tile of its rows (H,)
and of its columns (W,), and their cell (2,) in the tile's units."""

BAND = 250_000  # pixels that are painted at a time


@dataclass(frozen=True)
class Tile:
    """A rectangle of the input, and how far it overlaps the tiles above, to its left and right.

    Rows and columns are counted from `border` pixels outside the input, which is continued there by
    its outermost pixels.
    """

    top: int
    left: int
    bottom: int
    right: int
    over_top: int
    over_left: int
    over_right: int
    border: int = 0

    def cut(self, image: Tensor) -> Tensor:
        """Return the tile's part of the input (..., h, w)."""
        spans = (self.top, self.bottom), (self.left, self.right)
        rows, cols = (
            (torch.arange(*span, device=image.device) - self.border).clamp(0, n - 1)
            for span, n in zip(spans, image.shape[-2:], strict=True)
        )
        return image.index_select(-2, rows).index_select(-1, cols)

    def latent(self, zoom: float) -> Place:
        """Return where the tile lies in the latent, `zoom` latent pixels per input pixel."""
        spans = (self.top, self.bottom), (self.left, self.right)
        starts = [round(low * zoom) for low, _ in spans]
        stops = [max(a + 1, round(b * zoom)) for a, (_, b) in zip(starts, spans, strict=True)]
        return (..., slice(starts[0], stops[0]), slice(starts[1], stops[1]))

    def axes(self, low_size: Size, size: Size, window: Window | None = None) -> Axes:
        """Find the output pixels, or those of a window of it, whose centres lie in the tile.

        `low_size` is the whole input's, `size` the whole output's.
        """
        top, left, height, width = window or (0, 0, *size)
        spans = (self.top, self.bottom, top, height), (self.left, self.right, left, width)
        axes, starts, cells = [], [], []
        for (low, high, first, length), n, total in zip(spans, low_size, size, strict=True):
            centres = torch.arange(first, first + length, dtype=torch.float64) + 0.5
            centres = centres * (n / total) + self.border
            inside = (centres >= low) & (centres < high)
            axes.append(((centres[inside] - low) * (2 / (high - low)) - 1).float())
            starts.append(int(inside.float().argmax()))
            cells.append(2 * n / total / (high - low))
        return (*starts, len(axes[0]), len(axes[1])), *axes, torch.tensor(cells)


def as_floats(image: Tensor) -> Tensor:
    """Return an image of bytes as floats in [-1, 1], and floats as they are."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image


def tiles(size: Size, side: int, overlap: int, border: int = 0) -> Iterator[Tile]:
    """Cover an image of `size` with tiles of at most `side`, overlapping by at least `overlap`.

    They cover `border` pixels more on each side. ValueError unless 0 <= overlap < side.
    """
    if not 0 <= overlap < side:
        raise InputError(f"a tile of {side} px cannot overlap by {overlap} px; take a larger tile")
    rows, cols = (_spans(n + 2 * border, side, overlap) for n in size)
    for (top, bottom, over_top, _), (left, right, *over) in itertools.product(rows, cols):
        yield Tile(top, left, bottom, right, over_top, *over, border)


def _spans(n: int, side: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Return evenly spread (start, end, overlap before, overlap after): few, then short."""
    count = max(1, math.ceil((n - overlap) / (side - overlap)))
    side = math.ceil((n + (count - 1) * overlap) / count)
    starts = [round(i * (n - side) / (count - 1)) for i in range(count)] if count > 1 else [0]
    ends = [min(n, start + side) for start in starts]
    overs = [0, *(end - start for end, start in zip(ends[:-1], starts[1:], strict=True)), 0]
    return list(zip(starts, ends, overs[:-1], overs[1:], strict=True))


def blend(parts: Iterable[tuple[Place, Tensor]], like: Tensor) -> Tensor:
    """Lay overlapping parts of a tensor together, each fading out towards its border.

    `parts` cover the rows and columns of `like` (B, c, h, w); the result is what they say there,
    each weighted by the distance from its own border.
    """
    total, weights = torch.zeros_like(like), like.new_zeros(like.shape[-2:])
    for place, part in parts:
        rows, columns = (_tent(n, like) for n in part.shape[-2:])
        weight = rows[:, None] * columns  # (h', w')
        total[place] += weight * part
        weights[place] += weight
    return total / weights


def blended(
    denoisers: Sequence[tuple[Place, Denoiser]], after: Callable[[], None] | None = None
) -> Denoiser:
    """Return a denoiser of the whole latent from one per tile; `after()` follows each call.

    At every step the noise that the tiles see is blended where they overlap, so that they agree on
    one latent. Implements the fusion of Bar-Tal et al. 2023 (MultiDiffusion).
    """

    def parts(z: Tensor, t: Tensor) -> Iterator[tuple[Place, Tensor]]:
        for place, denoise in denoisers:
            yield place, denoise(z[place].contiguous(memory_format=torch.channels_last), t)
            if after:
                after()

    return lambda z, t: blend(parts(z, t), z)


def _tent(n: int, like: Tensor) -> Tensor:
    """Return the distances (n,) of n pixels from the border."""
    position = torch.arange(n, device=like.device, dtype=like.dtype) + 0.5
    return torch.minimum(position, n - position)


def paint(
    first_stage: FirstStage,
    low: Tensor,
    size: Size,
    latents: Iterable[tuple[Tile, Tensor]],
    dtype: torch.dtype = torch.float32,
    features_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return all `bands` as one image (3, height, width), on the device of `low`.

    `dtype` is float32, in [-1, 1], or uint8 for a quarter of the memory.
    """
    out, top = torch.empty(3, *size, dtype=dtype, device=low.device), 0
    for band in bands(first_stage, low, size, latents, features_dtype):
        place = out[:, top : top + band.shape[1]]
        place.copy_(((band + 1) * 127.5).round() if dtype == torch.uint8 else band)
        top += band.shape[1]
    return out


@torch.no_grad()
def bands(
    first_stage: FirstStage,
    low: Tensor,
    size: Size,
    latents: Iterable[tuple[Tile, Tensor]],
    dtype: torch.dtype = torch.float32,
    row: int = 0,
) -> Iterator[Tensor]:
    """Decode overlapping tiles' latents into one image that agrees with `low`, from `row` down.

    Yields bands (3, rows, width) in [-1, 1] of about `BAND` pixels, on the device of `low`. The
    memory holds the features of a few rows of tiles, and a few input rows' worth of the image. An
    image with a side below the input's is the average of a larger one.

    Parameters
    ----------
    low
        The input (3, h, w): floats in [-1, 1], or uint8.
    size
        (height, width) of the image.
    latents
        Tiles of the input in their order, each with its unscaled latent (1, c, h', w').
    dtype
        What the decoder computes in, float32 or bfloat16; the rest is float32.
    row
        Rows of the image above it are left out.

    """
    if (n := reduction(size, low.shape[-2:])) > 1:
        larger = bands(first_stage, low, (n * size[0], n * size[1]), latents, dtype, n * row)
        yield from _averaged(larger, n)
        return
    n, first = low.shape[-2], _depends(low.shape[-2], size[0], row, row + 1)[-1][0]
    above = (first + 0.5) * n / size[0]  # in rows of the input
    below = (part for part in latents if part[0].bottom - part[0].border > above)

    def features(z: Tensor) -> Tensor:
        with computing(z.device, dtype):
            return first_stage.features(z.contiguous(memory_format=torch.channels_last)).to(z)

    decoded = ((tile, features(z)) for tile, z in below)
    found = _painted(first_stage.liif, low, size, decoded, first)
    for band in _back_projected(found, low, size, row, first):
        yield band.clamp(-1, 1)


def reduction(size: Size, low_size: Size) -> int:
    """Return the least n with which `n * size` reaches the input's size along both axes."""
    return max(math.ceil(low / side) for side, low in zip(size, low_size, strict=True))


def _averaged(bands: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    """Average n x n pixels of an image that comes in bands (3, rows, width)."""
    waiting: list[Tensor] = []
    for band in bands:
        band = torch.cat([*waiting, band], dim=1)
        whole = band.shape[1] // n * n
        waiting = [band[:, whole:]]
        if whole:
            yield F.avg_pool2d(band[None, :, :whole], n)[0]


def _painted(
    liif: LIIF | InterpolatedLIIF,
    low: Tensor,
    size: Size,
    tiles: Iterable[tuple[Tile, Tensor]],
    first: int,
) -> Iterator[Tensor]:
    """Yield the image of tiles with their features, in bands (3, rows, width), from row `first`."""
    held: list[tuple[Tile, Tensor, Axes]] = []  # those that may reach below row `first`
    step = max(1, BAND // size[1])

    def until(stop: int) -> Iterator[Tensor]:
        for top in range(first, stop, step):
            band = torch.empty(3, min(step, stop - top), size[1], device=low.device)
            for part in held:
                _paint_tile(liif, part, band, top)
            yield band

    for _, parts in itertools.groupby(tiles, key=lambda part: part[0].top):
        row = [(*part, part[0].axes(low.shape[-2:], size)) for part in parts]
        (top, *_), *_ = row[0][-1]
        yield from until(top)
        first = max(first, top)
        held = [part for part in held if sum(part[-1][0][::2]) > first] + row
    yield from until(size[0])


def _paint_tile(
    liif: LIIF | InterpolatedLIIF, part: tuple[Tile, Tensor, Axes], band: Tensor, first: int
) -> None:
    """Paste what a tile shows into a band (3, rows, width), whose first row is named."""
    tile, features, ((top, left, height, width), y, x, cells) = part
    start, stop = (min(max(row - top, 0), height) for row in (first, first + band.shape[1]))
    if start < stop and width:
        places = (axis.to(features) for axis in (y[start:stop], x, cells[None]))
        rgb = liif.query_grid(features, *places)[0].to(band)  # (3, stop - start, width)
        window = (top + start - first, left, stop - start, width)
        paste(band, rgb, window, y[start:stop], x, tile)


def back_project(rgb: Tensor, low: Tensor, rounds: int = 2) -> Tensor:
    """Correct an image (3, H, W) so that, reduced, it agrees with its input (3, h, w).

    The difference that an antialiased bicubic reduction leaves is enlarged and added, `rounds`
    times. An image smaller than its input is returned as it is. Source: Irani and Peleg 1991.
    """
    if reduction(rgb.shape[-2:], low.shape[-2:]) > 1:
        return rgb
    bicubic = {"mode": "bicubic", "antialias": True}
    for _ in range(rounds):
        error = low[None] - F.interpolate(rgb[None], low.shape[-2:], **bicubic)
        rgb = rgb + F.interpolate(error, rgb.shape[-2:], **bicubic)[0]
    return rgb


def _back_projected(
    bands: Iterable[Tensor], low: Tensor, size: Size, row: int, first: int
) -> Iterator[Tensor]:
    """Do to an image that comes in bands of rows what `back_project` does to the whole.

    With e = low - reduced(rgb), two rounds add enlarged(2 e - reduced(enlarged(e))). Each band
    waits for the rows below it that its correction depends on, of which only the reduced columns
    count. The bands begin at row `first`, the result at row `row`.
    """
    (n, width), total = low.shape[-2:], size[0]
    narrow, waiting = torch.empty(3, 0, width, device=low.device), deque()
    for band in bands:
        above = row - first - narrow.shape[1]
        narrow = torch.cat([narrow, _columns(band, width)], dim=1)
        if above < band.shape[1]:
            waiting.append(band[:, max(0, above) :])
        while waiting:
            span = row, row + waiting[0].shape[1]
            of_low, of_rgb, of_error, (_, needed) = _depends(n, total, *span)
            if needed > first + narrow.shape[1]:
                break
            error = as_floats(low[:, slice(*of_error)]) - _rows(narrow, first, (total, n), of_error)
            again = _rows(error, of_error[0], (n, total), of_rgb)
            again = _rows(again, of_rgb[0], (total, n), of_low)
            again = _columns(_columns(again, size[1]), width)
            inner = error[:, of_low[0] - of_error[0] : of_low[1] - of_error[0]]
            added = _columns(2 * inner - again, size[1])  # (3, rows, W)
            yield waiting.popleft() + _rows(added, of_low[0], (n, total), span)
            row = span[1]
            needed = _depends(n, total, row, row + 1)[-1][0]
            narrow, first = narrow[:, needed - first :], needed


def _depends(n: int, total: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the rows of the correction, of enlarged(e), of e and of the image that rows take.

    The rows [start, stop) are of `total`; the input has n.
    """
    spans = [(start, stop)]
    for source, target in ((n, total), (total, n)) * 2:
        spans.append(_support(source, target, *spans[-1]))
    return spans[1:]


def _support(n: int, m: int, start: int, stop: int) -> tuple[int, int]:
    """Return which of n rows the rows [start, stop) of m are resampled from."""
    step, reach = n / m, 2 * max(n / m, 1)
    low, high = (start + 0.5) * step - reach, (stop - 0.5) * step + reach
    return max(0, math.floor(low)), min(n, math.ceil(high))


def _rows(rows: Tensor, first: int, sizes: tuple[int, int], span: tuple[int, int]) -> Tensor:
    """Resample rows as `F.interpolate` does, antialiased bicubic, but only those in `span`.

    `rows` (..., k, w) begin at row `first` of an image with as many rows as `sizes` says first;
    the result is rows [start, stop) of as many as it says last.
    """
    step = sizes[0] / sizes[1]
    centres = (torch.arange(*span, dtype=torch.float64) + 0.5) * step
    return cubic(rows, centres, max(step, 1), first)


def cubic(rows: Tensor, centres: Tensor, shrink: float, first: int = 0) -> Tensor:
    """Filter rows (..., k, w), from number `first` on, at m centres: (..., m, w).

    By the cubic of a = -0.5 (Keys 1981), `shrink` rows wide; each centre's weights add up to 1.
    """
    positions = first + torch.arange(rows.shape[-2], dtype=torch.float64) + 0.5
    x = ((positions - centres[:, None]) / shrink).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return (weights / weights.sum(dim=1, keepdim=True)).float().to(rows) @ rows


def _columns(image: Tensor, width: int) -> Tensor:
    """Resample the columns of (3, h, w), antialiased bicubic."""
    return F.interpolate(image[None], (image.shape[-2], width), mode="bicubic", antialias=True)[0]


def paste(out: Tensor, rgb: Tensor, window: Window, y: Tensor, x: Tensor, tile: Tile) -> None:
    """Lay a tile's pixels (3, h, w) over `out` (3, H, W), in place: row by row, left to right.

    `window`, `y` and `x` come from `tile.axes`. Across the overlap with the tiles above and to
    the left the new pixels fade in linearly; where those tiles have no pixel, the new ones are laid
    as they are. Over the row above they leave room for what the right neighbour will add, so that
    four tiles meet in their bilinear blend, without a step.
    """
    top, left, height, width = window
    tall, wide = tile.bottom - tile.top, tile.right - tile.left
    fade_y, fade_x = _ramp(y, tile.over_top / tall)[:, None], _ramp(x, tile.over_left / wide)
    to_come = 1 - _ramp(-x, tile.over_right / wide)  # the right neighbour's weight
    shared = fade_y * fade_x * (1 - to_come) / (1 - fade_y * to_come).clamp(1e-6, 1)
    alpha = torch.where(fade_y < 1, shared, fade_x).to(out)  # (h, w)
    target = out[:, top : top + height, left : left + width]
    target.copy_(torch.where(alpha < 1, target + alpha * (rgb - target), rgb))


def _ramp(coords: Tensor, share: float) -> Tensor:
    """Return weights (n,) that rise over the first `share` of [-1, 1] and are 1 after it."""
    position = (coords.double() + 1) / 2
    weight = position / share if share else torch.ones_like(position)
    return torch.where(position < share - 1e-6, weight, 1.0).float()
