"""The lightweight latent transformer: a latent as few rich tokens that all see each other.

Attention over n positions costs n^2, so neighbouring positions are merged into one token first: at
`merge` 2 there are a quarter of the tokens and a sixteenth of the pairs. Positions enter as
rotations of queries and keys (Su et al. 2021), half of the numbers by row and half by column, so
that attention sees offsets alone and takes grids of any size. Time enters as a shift, a scale and a
gate of each layer, from one projection that all blocks share (PixArt, Chen et al. 2024).

`TransformerDenoiser` is a transformer alone: tokens of a latent, and long skips between the halves.
Its layout is that of U-ViT (Bao et al. 2023) with the same blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale import coords
from arbscale.coords import Size
from arbscale.store import InputError
from arbscale.unet import attend, run, timestep_embedding, with_condition, zeroed

Near = tuple[Size | None, int | None]
"""Tokens' grid (rows, columns), and the window that attention reads, as `attend` takes them."""

LONGEST = 100.0  # period of the slowest rotation in units of 2 pi tokens; latent grids are small


def merge_positions(x: Tensor, merge: int) -> tuple[Tensor, Size]:
    """Merge squares of `merge` positions per side: (B, C, h, w) -> (B, N, C * merge^2), the grid.

    Where a side is not a multiple of `merge`, its last position is repeated.
    """
    below, right = (-n % merge for n in x.shape[-2:])
    if below or right:  # torch.compile cannot train with a padding of zero width
        x = F.pad(x, (0, right, 0, below), mode="replicate")
    x = F.pixel_unshuffle(x, merge)  # (B, C * merge^2, rows, columns)
    return x.flatten(2).mT, tuple(x.shape[-2:])


def spread_tokens(tokens: Tensor, grid: Size, merge: int, size: Size) -> Tensor:
    """Undo `merge_positions`: (B, N, C * merge^2) -> (B, C, h, w) for `size` = (h, w)."""
    x = tokens.mT.unflatten(-1, grid)  # (B, C * merge^2, rows, columns)
    return F.pixel_shuffle(x, merge)[..., : size[0], : size[1]]


def rotary_angles(grid: Size, head_channels: int, device: torch.device | None = None) -> Tensor:
    """Return each token's angles (N, head_channels / 2): those of its row, then of its column."""
    quarter = head_channels // 4
    turns = LONGEST ** -(torch.arange(quarter, device=device) / quarter)  # radians per token
    rows, columns = (torch.arange(n, device=device)[:, None] * turns for n in grid)
    angles = [rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)]
    return torch.cat(angles, dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of vectors (..., N, D) by angles (N, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)  # the angles themselves want float32
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TokenBlock(nn.Module):
    """Attention and a gated MLP, each behind a normalisation: tokens (B, N, width) -> the same."""

    def __init__(self, width: int, head_channels: int):
        super().__init__()
        if width % head_channels or head_channels % 4:
            found = f"{width} and {head_channels}"
            raise InputError(f"width is a multiple of head_channels, and that of 4, got {found}")
        self.heads = width // head_channels
        hidden = 8 * width // 3 // 8 * 8  # as many weights as an ungated MLP of four widths has
        self.modulation = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.widen = nn.Linear(width, 2 * hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, modulation: Tensor, angles: Tensor, near: Near = (None, None)
    ) -> Tensor:
        """Add what attention and MLP find.

        Takes tokens (B, N, width), time's modulation (B, 6, width) and `rotary_angles` (N, D/2).
        """
        shift, scale, gate, *rest = (modulation + self.modulation)[:, :, None].unbind(1)
        x = x + (1 + gate) * self._attend(_modulated(x, shift, scale), angles, near)
        shift, scale, gate = rest  # (B, 1, width) each
        return x + (1 + gate) * self._mlp(_modulated(x, shift, scale))

    def _attend(self, x: Tensor, angles: Tensor, near: Near = (None, None)) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
        h = attend(rotate(q, angles), rotate(k, angles), v, *near)
        return self.out(h.transpose(1, 2).flatten(2))  # (B, N, width)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, value = self.widen(x).chunk(2, dim=-1)  # (B, N, hidden) each
        return self.narrow(F.silu(gate) * value)


class LatentTransformer(nn.Module):
    """Global context for a grid of activations: (B, channels, h, w), any size -> the same.

    Starts as the identity: what it adds is 0 until it has learned.

    Parameters
    ----------
    channels
        Of the activations.
    time_dim
        Of the time embedding.
    width
        Of a token, a multiple of `head_channels`.
    blocks
        How many.
    merge
        Side of the square of positions that becomes one token.
    head_channels
        Width of an attention head, a multiple of 4.

    """

    window: int | None = None  # side of what a position reads, where it is not all

    def __init__(
        self, channels: int, time_dim: int, width: int, blocks: int, merge: int, head_channels: int
    ):
        super().__init__()
        self.merge, self.head_channels = merge, head_channels
        self.norm = nn.GroupNorm(32, channels)
        self.embed = nn.Linear(channels * merge**2, width)
        self.time = zeroed(nn.Linear(time_dim, 6 * width))
        self.blocks = nn.ModuleList(TokenBlock(width, head_channels) for _ in range(blocks))
        self.out_norm = nn.LayerNorm(width)
        self.out = zeroed(nn.Linear(width, channels * merge**2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Add what the tokens have told each other; `time` is (B, time_dim)."""
        tokens, grid = merge_positions(self.norm(x), self.merge)
        tokens = self.embed(tokens)  # (B, N, width)
        modulation = self.time(F.silu(time)).unflatten(-1, (6, -1))  # (B, 6, width)
        angles = rotary_angles(grid, self.head_channels, x.device)
        near = grid, self.window and max(1, self.window // self.merge)
        for block in self.blocks:
            tokens = block(tokens, modulation, angles, near)
        found = self.out(self.out_norm(tokens))  # (B, N, channels * merge^2)
        return x + spread_tokens(found, grid, self.merge, tuple(x.shape[-2:]))


class TransformerDenoiser(nn.Module):
    """Predict the noise in a latent: (B, c, h, w), any h and w -> (B, c, h, w).

    Attention with rotary positions knows offsets alone, and nothing here pads with zeros, so each
    token is told its place in the image, (y, x) in [-1, 1].

    Parameters as in `unet.UNet` and `LatentTransformer`, `checkpointing` too; beside the tokens,
    block i reads what block `blocks - 1 - i` wrote.
    """

    window: int | None = None  # side of what a position reads, where it is not all

    def __init__(
        self,
        latent_channels: int,
        condition_channels: int = 0,
        width: int = 128,
        blocks: int = 5,
        merge: int = 2,
        head_channels: int = 32,
    ):
        super().__init__()
        self.condition_channels, self.head_channels = condition_channels, head_channels
        self.width, self.merge, self.checkpointing = width, merge, False
        inside = latent_channels + condition_channels + 2
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.embed = nn.Linear(inside * merge**2, width)
        self.blocks = nn.ModuleList(TokenBlock(width, head_channels) for _ in range(blocks))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks // 2))
        self.norm = nn.LayerNorm(width)
        self.out = zeroed(nn.Linear(width, latent_channels * merge**2))

    def forward(self, z_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the noise in scaled latents `z_t` (B, c, h, w) at integer steps `t` (B,).

        `condition` (B, condition_channels, h, w) is scaled, too; give it where the network was
        built for one, else ValueError.
        """
        h = with_condition(z_t, condition, self.condition_channels)
        size = tuple(z_t.shape[-2:])
        places = coords.grid(size).to(z_t).permute(2, 0, 1).expand(len(z_t), 2, *size)
        h, grid = merge_positions(torch.cat([h, places], dim=1), self.merge)
        h = self.embed(h)  # (B, N, width)
        time = self.time(timestep_embedding(t, self.width).to(h))  # (B, width)
        modulation = self.modulation(F.silu(time)).unflatten(-1, (6, -1))  # (B, 6, width)
        angles = rotary_angles(grid, self.head_channels, h.device)
        near = grid, self.window and max(1, self.window // self.merge)
        kept, half = [], len(self.skips)
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - half:
                h = self.skips[i - len(self.blocks)](torch.cat([h, kept.pop()], dim=-1))
            h = run(self, block, h, modulation, angles, near)
            if i < half:
                kept.append(h)
        h = self.out(self.norm(h))  # (B, N, c * merge^2)
        return spread_tokens(h, grid, self.merge, size)  # (B, c, h, w)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
