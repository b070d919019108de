"""LIIF: an MLP that paints any pixel of any image from a grid of features.

Implements the local implicit image function of Chen, Liu and Wang 2021 without feature unfolding,
as Kim and Kim 2024 use it. A query point looks at the four latent pixels around it; for each, the
MLP sees that pixel's feature, the offset from its centre and the output pixel's extent (the cell),
and the four answers are blended by the area of the diagonally opposite rectangle.

`InterpolatedLIIF` is an improvement of ours, with the same methods: it blends the four features
before the MLP in place of the four answers after it, so that the MLP runs once for a point.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale.coords import Size, Window, cell, check_size, check_window, grid
from arbscale.store import InputError

BLOCK = 2048  # pixels rendered at a time: the widest activations stay in the cache
TIE = 1e-5  # of a latent pixel: a point on the border belongs to the latent pixel after it


class _Head(nn.Module):
    """What both heads share: points and grids in blocks of bounded memory.

    A head prepares a table (B, rows, hidden) from features (B, C, h, w) at cells (B, 2) once, by
    `_project`, and paints colours (N, 3) at points (N, 2) from one image's table, by `_paint`.
    """

    in_channels: int

    def query(
        self, features: Tensor, coords: Tensor, cells: Tensor, block: int | None = BLOCK
    ) -> Tensor:
        """Colours at scattered points.

        Parameters
        ----------
        features
            (B, C, h, w).
        coords
            (B, N, 2), (y, x) in [-1, 1], pixel centres of the wanted image.
        cells
            (B, 2), extent (y, x) of one pixel of the wanted image, 2 / size.
        block
            Points computed at a time; None for all at once. The result is the same.

        Returns
        -------
        Tensor
            (B, N, 3), about [-1, 1].

        """
        batch, _, h, w = features.shape
        if coords.ndim != 3 or coords.shape[0] != batch or coords.shape[-1] != 2:
            raise InputError(f"coords must be ({batch}, N, 2), got {tuple(coords.shape)}")
        if cells.shape != (batch, 2):
            raise InputError(f"cells must be ({batch}, 2), got {tuple(cells.shape)}")
        table = self._project(features, cells)  # (B, h*w, hidden)
        block = block or coords.shape[1]
        return torch.stack(
            [
                torch.cat([self._paint(rows, (h, w), part) for part in points.split(block)])
                for rows, points in zip(table, coords, strict=True)
            ]
        )

    def render(
        self,
        features: Tensor,
        size: int | Size,
        window: Window | None = None,
        block: int | None = BLOCK,
    ) -> Tensor:
        """Paint an image of any `size`, or a window of it, in blocks of bounded memory.

        Features (B, C, h, w) -> (B, 3, height, width), about [-1, 1]. `size` is (height, width) of
        the whole image; `window` is (top, left, height, width) in its pixels; `block` as in
        `query`.
        """
        size = check_size(size)
        _, _, height, width = window = check_window(window, size)
        coords = grid(size, window, features.device).view(1, -1, 2)  # (1, H*W, 2)
        cells = cell(size, features.device)
        batch = len(features)
        rgb = self.query(
            features, coords.expand(batch, -1, -1), cells.expand(batch, -1), block
        )  # (B, H*W, 3)
        return rgb.mT.reshape(batch, 3, height, width)

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise InputError(
                f"features must be (B, {self.in_channels}, h, w), got {tuple(features.shape)}"
            )


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
        """Apply the first layer, but for its offset columns, to the grid: (B, h*w, hidden)."""
        self._check_features(features)
        first = self.layers[0]
        c, (h, w) = self.in_channels, features.shape[-2:]
        bias = first.bias.expand(len(cells), -1)  # (B, hidden)
        if self.cell_decode:
            scaled = cells * cells.new_tensor([h, w])
            bias = bias + scaled.to(features) @ first.weight[:, c + 2 :].mT
        table = F.linear(features.flatten(2).mT, first.weight[:, :c])  # (B, h*w, hidden)
        return table + bias[:, None]

    def _paint(self, table: Tensor, latent_size: Size, coords: Tensor) -> Tensor:
        """Colours (N, 3) at points (N, 2) from one image's table (h*w, hidden)."""
        steps = (-0.5, 0.5) if self.local_ensemble else (0.0,)
        rows, cols = (
            [_neighbour(coords[:, axis], latent_size[axis], step) for step in steps]
            for axis in (0, 1)
        )
        to_offset = self.layers[0].weight[:, self.in_channels : self.in_channels + 2].mT
        rgb, total = 0.0, 0.0
        for i, (row, dy) in enumerate(rows):
            for j, (col, dx) in enumerate(cols):
                index = row * latent_size[1] + col  # (N,)
                offset = torch.stack([dy, dx], dim=-1).to(table)  # (N, 2)
                hidden = torch.addmm(table.index_select(0, index), offset, to_offset)  # (N, hidden)
                for layer in self.layers[1:]:
                    hidden = layer(hidden.relu_())
                opposite = (rows[i - 1][1] * cols[j - 1][1]).abs() + 1e-9  # (N,)
                rgb = rgb + hidden * opposite[:, None].to(hidden)
                total = total + opposite[:, None].to(hidden)
        return rgb / total  # (N, 3)


class InterpolatedLIIF(_Head):
    """Features (B, C, h, w) -> colours (3 channels) at any point, by one MLP call for a point.

    A local implicit image function whose features are interpolated in place of its predictions.
    The first layer acts on the feature grid and sees 3 x 3 features (the feature unfolding of Chen,
    Liu and Wang 2021): with one alone, what neighbouring latent pixels say does not match where it
    is blended, and their borders show. Its output is interpolated bilinearly at the point;
    the point's place within its latent pixel (as sines and cosines, so that it is continuous across
    borders) and the cell enter there; ReLU and the other layers follow. Where LIIF needs its local
    ensemble for continuity, this is continuous by construction.

    Parameters
    ----------
    in_channels
        C.
    hidden
        Widths of the hidden layers, at least one.
    cell_decode
        Tell the MLP the output pixel's extent.
    finer
        The first layer gives each latent pixel `finer` x `finer` features, a finer grid to
        interpolate on, while the decoder stays at the latent's resolution.

    """

    PERIODS = (1, 2)  # of the position code in a latent pixel

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
        self.place = nn.Linear(4 * len(self.PERIODS) + 2 * cell_decode, hidden[0], bias=False)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(hidden, [*hidden[1:], 3], strict=True)
        )
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="linear")
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def _project(self, features: Tensor, cells: Tensor) -> Tensor:
        """Apply the first layer to the grid: (B, finer*h * finer*w, hidden)."""
        self._check_features(features)
        table = F.pixel_shuffle(self.first(features), self.finer).flatten(2).mT
        if self.cell_decode:
            scaled = (cells * cells.new_tensor(features.shape[-2:])).to(features)
            table = table + F.linear(scaled, self.place.weight[:, -2:])[:, None]
        return table

    def _paint(self, table: Tensor, latent_size: Size, coords: Tensor) -> Tensor:
        """Colours (N, 3) at points (N, 2) from one image's table."""
        sides = [n * self.finer for n in latent_size]
        (top, bottom, y), (left, right, x) = (
            _between(coords[:, axis], sides[axis]) for axis in (0, 1)
        )
        rows = [
            torch.lerp(
                table.index_select(0, row * sides[1] + left),
                table.index_select(0, row * sides[1] + right),
                x.to(table),
            )
            for row in (top, bottom)
        ]
        code = self._code(coords, latent_size).to(table)  # (N, 4 periods)
        hidden = torch.lerp(*rows, y.to(table)) + F.linear(
            code, self.place.weight[:, : code.shape[1]]
        )
        for layer in self.layers:
            hidden = layer(hidden.relu())
        return hidden  # (N, 3)

    def _code(self, coords: Tensor, latent_size: Size) -> Tensor:
        """Sines and cosines (N, 4 periods) of a point's place (y, x) within its latent pixel."""
        place = (coords + 1) * (math.pi * coords.new_tensor(latent_size))  # a latent pixel is 2 pi
        angles = torch.cat([place * n for n in self.PERIODS], dim=1)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _between(position: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the grid pixels before and after each point, and the share (N, 1) of the latter.

    Beyond the outermost centres the outermost pixel is repeated.
    """
    u = ((position + 1) * (n / 2) - 0.5).clamp(0, n - 1)
    before = u.floor().long()
    return before, (before + 1).clamp(max=n - 1), (u - before)[:, None]


def _neighbour(position: Tensor, n: int, step: float) -> tuple[Tensor, Tensor]:
    """Index of the latent pixel `step` pixels away, clamped to [0, n), and the offset from it."""
    u = (position + 1) * (n / 2)  # in latent pixels, from 0 to n
    index = (u + step + TIE).floor().clamp(0, n - 1)
    return index.long(), 2 * (u - index) - 1
