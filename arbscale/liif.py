"""LIIF: an MLP that predicts the colour of any pixel of any image from a grid of features.

Implements the local implicit image function of Chen, Liu and Wang 2021 without feature unfolding,
as Kim and Kim 2024 use it. A query point looks at the four latent pixels around it; for each, the
MLP sees that pixel's feature, the offset from its centre and the output pixel's extent (the cell),
and the four answers are blended by the area of the diagonally opposite rectangle.

`InterpolatedLIIF` is an improvement of ours, with the same methods: it blends the four features
before the MLP in place of the four answers after it, so that the MLP runs once for a point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale.coords import Size, Window, cell, check_size, check_window, pixel_centres
from arbscale.store import InputError

BLOCK = 4096  # pixels rendered at a time: the widest activations stay in the cache
WIDTH = 512  # at most, of a block of a grid, which is a few rows high
REACH = 2  # latent pixels above, below and beside a point's own that its colour depends on
TIE = 1e-5  # of a latent pixel: a point on the border belongs to the latent pixel after it
Axis = list[Tensor]
"""What a head needs of N positions along one axis: tensors (N, ...)."""


class _Head(nn.Module):
    """What both heads share: points and grids in blocks of bounded memory.

    A head prepares a table (B, rows, columns, hidden) from features (B, C, h, w) at cells (B, 2)
    once, by `_project`. From one image's table, and what `_axis` tells of positions along each
    axis, it paints colours: (N, 3) at points by `_paint`, (H * W, 3) on a grid by `_paint_grid`.
    """

    in_channels: int

    def query(self, features: Tensor, coords: Tensor, cells: Tensor) -> Tensor:
        """Colours (B, N, 3), about [-1, 1], at scattered points, in blocks of bounded memory.

        Takes features (B, C, h, w); coords (B, N, 2), (y, x) in [-1, 1], pixel centres of the
        wanted image; and cells (B, 2), the extent (y, x) of one of its pixels, 2 / size.
        """
        batch = len(features)
        if coords.ndim != 3 or coords.shape[0] != batch or coords.shape[-1] != 2:
            raise InputError(f"coords must be ({batch}, N, 2), got {tuple(coords.shape)}")
        self._check(features, cells)
        images = []
        for table, points in zip(self._project(features, cells), coords, strict=True):
            parts = points.split(BLOCK)
            images.append(torch.cat([self._paint(table, *self._axes(table, *p.mT)) for p in parts]))
        return torch.stack(images)

    def query_grid(self, features: Tensor, y: Tensor, x: Tensor, cells: Tensor) -> Tensor:
        """Colours (B, 3, H, W) where rows y (H,) cross columns x (W,), positions in [-1, 1].

        What `query` gives at these points, but what a row or a column shares is computed once, and
        the table has only the features that the points lie among.
        """
        self._check(features, cells)
        features, y, cells = _among(features, y, cells, 0)
        features, x, cells = _among(features, x, cells, 1)
        across = math.ceil(len(x) / math.ceil(len(x) / min(BLOCK, WIDTH)))
        tables, images = self._project(features, cells), []
        down = max(1, BLOCK // max(across, tables.shape[2]))
        rows, cols = self._axes(tables[0], y, x)
        parts = list(_split(cols, across))
        for table in tables:
            image = torch.cat(
                [
                    torch.cat([self._paint_grid(table, band, part) for part in parts], 1)
                    for band in _split(rows, down)
                ]
            )  # (H, W, 3)
            images.append(image.permute(2, 0, 1).contiguous())
        return torch.stack(images) if len(images) > 1 else images[0][None]

    def render(self, features: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Paint an image of any `size`, or a window of it, in blocks of bounded memory.

        Features (B, C, h, w) -> (B, 3, height, width), about [-1, 1]. `size` is (height, width) of
        the whole image; `window` is (top, left, height, width) in its pixels.
        """
        size, device = check_size(size), features.device
        top, left, height, width = check_window(window, size)
        y = pixel_centres(size[0], device)[top : top + height]
        x = pixel_centres(size[1], device)[left : left + width]
        cells = cell(size, device).expand(len(features), -1)
        return self.query_grid(features, y, x, cells)

    def _check(self, features: Tensor, cells: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_channels or not features.numel():
            wanted = f"(B, {self.in_channels}, h, w)"
            raise InputError(f"features must be {wanted}, got {tuple(features.shape)}")
        if cells.shape != (len(features), 2):
            raise InputError(f"cells must be ({len(features)}, 2), got {tuple(cells.shape)}")

    def _axes(self, table: Tensor, y: Tensor, x: Tensor) -> tuple[Axis, Axis]:
        return tuple(self._axis(at, axis, table) for axis, at in enumerate((y, x)))


class LIIF(_Head):
    """Features (B, C, h, w) -> colours (3 channels) at any point.

    Offsets and cells are in units in which one latent pixel is 2 wide. The first linear layer is
    affine in the feature, so it is applied to the grid once, before the lookup: the same numbers
    as concatenating [feature, offset, cell] at each point, for a fraction of the work.

    Parameters
    ----------
    in_channels
        C.
    hidden
        Widths of the hidden layers, at least one.
    local_ensemble
        Blend the four nearest latent pixels' answers; otherwise take the nearest one's.
    cell_decode
        Tell the MLP the output pixel's extent.

    """

    def __init__(
        self,
        in_channels: int,
        hidden: tuple[int, ...] = (256,) * 4,
        local_ensemble: bool = True,
        cell_decode: bool = True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.local_ensemble = local_ensemble
        self.cell_decode = cell_decode
        widths = [in_channels + 2 + 2 * cell_decode, *hidden, 3]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        for i, layer in enumerate(self.layers):  # as in autoencoder._conv; ReLU takes half away
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if i else "linear")

    def _project(self, features: Tensor, cells: Tensor) -> Tensor:
        """Apply the first layer, but for its offset columns, to the grid: (B, h, w, hidden)."""
        first = self.layers[0]
        c, (h, w) = self.in_channels, features.shape[-2:]
        bias = first.bias.expand(len(cells), -1)  # (B, hidden)
        if self.cell_decode:
            scaled = cells * cells.new_tensor([h, w])
            bias = bias + scaled.to(features) @ first.weight[:, c + 2 :].mT
        table = F.linear(features.permute(0, 2, 3, 1), first.weight[:, :c])  # (B, h, w, hidden)
        return table + bias[:, None, None]

    def _axis(self, position: Tensor, axis: int, table: Tensor) -> Axis:
        """Return the neighbours' indices and the offsets from them, each (N, 1 or 2)."""
        steps = position.new_tensor([-0.5, 0.5] if self.local_ensemble else [0.0])
        u = ((position + 1) * (table.shape[axis] / 2))[:, None]  # in latent pixels, from 0 to n
        index = (u + steps + TIE).floor().clamp(0, table.shape[axis] - 1)
        return [index.long(), 2 * (u - index) - 1]

    def _paint(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Colours (N, 3) at N points: rows and columns are (N, ...), or broadcast to a grid."""
        (row, dy), (col, dx) = ([part.unbind(-1) for part in axis] for axis in (rows, cols))
        to_offset = self.layers[0].weight[:, self.in_channels : self.in_channels + 2].mT
        rgb, total = 0.0, 0.0
        for i, j in itertools.product(range(len(row)), range(len(col))):
            offset = torch.stack(torch.broadcast_tensors(dy[i], dx[j]), dim=-1).to(table)
            hidden = _look(table, row[i], col[j])  # (N, hidden)
            hidden = torch.addmm(hidden, offset.flatten(0, -2), to_offset)
            for layer in self.layers[1:]:
                hidden = layer(hidden.relu_())
            if not self.local_ensemble:
                return hidden
            # In float32 even where the rest is half, which rounds 1e-9 to 0.
            opposite = ((dy[i - 1] * dx[j - 1]).abs() + 1e-9).view(-1, 1)  # (N, 1)
            rgb = rgb + hidden * opposite
            total = total + opposite
        return (rgb / total).to(table)  # (N, 3)

    def _paint_grid(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Colours (H, W, 3); the MLP is so much of the work that the gather hardly counts."""
        size = len(rows[0]), len(cols[0])
        return self._paint(table, [part[:, None] for part in rows], cols).view(*size, 3)


class InterpolatedLIIF(_Head):
    """Features (B, C, h, w) -> colours (3 channels) at any point, by one MLP call for a point.

    A local implicit image function whose features are interpolated in place of its predictions.
    The first layer acts on the feature grid and sees 3 x 3 features (the feature unfolding of Chen,
    Liu and Wang 2021): with one alone, what neighbouring latent pixels say does not match where it
    is blended, and their borders show. Its output is interpolated bilinearly at the point. There
    the point's place within its latent pixel (one sine and cosine for each axis, so that it is
    continuous across borders) and the cell enter, and ReLU and the other layers follow. Where LIIF
    needs its local ensemble for continuity, this is continuous by construction.

    Parameters as in `LIIF`; the first layer gives each latent pixel `finer` x `finer` features, a
    finer grid to interpolate on, while the decoder stays at the latent's resolution.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: tuple[int, ...] = (96,) * 3,
        cell_decode: bool = True,
        finer: int = 1,
    ):
        super().__init__()
        self.in_channels, self.cell_decode, self.finer = in_channels, cell_decode, finer
        self.first = nn.Conv2d(
            in_channels, hidden[0] * finer**2, 3, padding=1, padding_mode="replicate"
        )
        self.place = nn.Linear(4 + 2 * cell_decode, hidden[0], bias=False)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(hidden, [*hidden[1:], 3], strict=True)
        )
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="linear")
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def _project(self, features: Tensor, cells: Tensor) -> Tensor:
        """Apply the first layer to the grid: (B, finer*h, finer*w, hidden)."""
        features = features.to(memory_format=torch.channels_last)  # as the table is
        table = F.pixel_shuffle(self.first(features), self.finer).permute(0, 2, 3, 1)
        if self.cell_decode:
            scaled = (cells * cells.new_tensor(features.shape[-2:])).to(features)
            table = table + F.linear(scaled, self.place.weight[:, -2:])[:, None, None]
        return table.contiguous()

    def _axis(self, position: Tensor, axis: int, table: Tensor) -> Axis:
        """Return the grid pixels before and after, the latter's share, and what the place adds.

        The place within a latent pixel comes as sines and cosines, which a linear layer reads, so
        its part of y and its part of x are sums that a row and a column have of their own.
        """
        n = table.shape[axis]
        u = ((position + 1) * (n / 2) - 0.5).clamp(0, n - 1)  # the outermost pixels are repeated
        before = u.floor().long()  # (N,)
        after, share = (before + 1).clamp(max=n - 1), (u - before)[:, None]  # (N,), (N, 1)
        angle = (position + 1) * (math.pi * n / self.finer)  # latent pixels of 2 pi
        code = torch.stack([angle.sin(), angle.cos()], dim=-1).to(table)  # (N, 2)
        weight = self.place.weight[:, axis:4:2]
        return [before, after, share.to(table), F.linear(code, weight)]

    def _paint(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Colours (N, 3) at N points."""
        (top, bottom, y, of_row), (left, right, x, of_column) = rows, cols
        upper, lower = (
            torch.lerp(_look(table, row, left), _look(table, row, right), x)
            for row in (top, bottom)
        )
        return self._mlp(torch.lerp(upper, lower, y) + of_row + of_column)

    def _paint_grid(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Colours (H, W, 3): the table is interpolated along y, then along x."""
        (top, bottom, y, of_row), (left, right, x, of_column) = rows, cols
        upper, lower = (table.index_select(0, row) for row in (top, bottom))
        lines = torch.lerp(upper, lower, y[:, None]) + of_row[:, None]  # (H, columns, hidden)
        before, after = (lines.index_select(1, column) for column in (left, right))
        hidden = before.lerp_(after, x).add_(of_column)  # (H, W, hidden)
        return self._mlp(hidden.flatten(0, 1)).view(*hidden.shape[:2], 3)

    def _mlp(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden.relu_())
        return hidden  # (N, 3)


def _among(features: Tensor, at: Tensor, cells: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Cut features (B, C, h, w) along an axis to those that positions (N,) are painted from.

    Returns them, and the positions and the cells (B, 2) in their units. Where more than half of the
    features are wanted, all stay.
    """
    n = features.shape[2 + axis]
    position = (at.cpu().double() + 1) * (n / 2)  # in features, from 0 to n
    first = max(0, int(position.min()) - REACH)
    last = min(n, int(position.max()) + REACH + 1)
    if 2 * (last - first) > n:
        return features, at, cells
    share, cells = n / (last - first), cells.clone()
    cells[:, axis] *= share
    at = (2 * (position - first) / (last - first) - 1).to(at)
    return features.narrow(2 + axis, first, last - first), at, cells


def _look(table: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the table's entries (N, hidden) at N rows and columns, which may be broadcast."""
    return table.flatten(0, 1).index_select(0, (row * table.shape[1] + col).flatten())


def _split(axis: Axis, n: int) -> Iterator[Axis]:
    """Cut what is known of an axis into parts of at most n positions."""
    return map(list, zip(*(part.split(n) for part in axis), strict=True))
