"""The denoiser that is a transformer alone: tokens of a latent, and long skips between the halves.

The layout is that of U-ViT (Bao et al. 2023) with the blocks of `transformer.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale import coords
from arbscale.transformer import TokenBlock, merge_positions, rotary_angles, spread_tokens
from arbscale.unet import run, timestep_embedding, with_condition


class TransformerDenoiser(nn.Module):
    """Predict the noise in a latent: (B, c, h, w), any h and w -> (B, c, h, w).

    Attention with rotary positions knows offsets alone, and nothing here pads with zeros, so each
    token is told its place in the picture, (y, x) in [-1, 1].

    Parameters
    ----------
    latent_channels
        c.
    condition_channels
        Channels of a condition that is concatenated to the noisy latent; 0 for none.
    width
        Of a token, a multiple of `head_channels`.
    blocks
        How many; block i reads what block `blocks - 1 - i` wrote, beside the tokens.
    merge
        Side of the square of positions that becomes one token.
    head_channels
        Width of an attention head, a multiple of 4.

    Attributes
    ----------
    checkpointing
        Keep no activation inside a block for the backward pass but compute them again.

    """

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
        self.modulation = nn.Linear(width, 6 * width)
        self.embed = nn.Linear(inside * merge**2, width)
        self.blocks = nn.ModuleList(TokenBlock(width, head_channels) for _ in range(blocks))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks // 2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, latent_channels * merge**2)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        z_t
            Noisy scaled latents (B, c, h, w).
        t
            Steps (B,), integers.
        condition
            Scaled latents (B, condition_channels, h, w), if the network was built for one.

        """
        h = with_condition(z_t, condition, self.condition_channels)
        size = tuple(z_t.shape[-2:])
        places = coords.grid(size).to(z_t).permute(2, 0, 1).expand(len(z_t), 2, *size)
        h, grid = merge_positions(torch.cat([h, places], dim=1), self.merge)
        h = self.embed(h)  # (B, N, width)
        time = self.time(timestep_embedding(t, self.width).to(h))  # (B, width)
        modulation = self.modulation(F.silu(time)).unflatten(-1, (6, -1))  # (B, 6, width)
        angles = rotary_angles(grid, self.head_channels, h.device)
        kept, half = [], len(self.skips)
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - half:
                h = self.skips[i - len(self.blocks)](torch.cat([h, kept.pop()], dim=-1))
            h = run(self, block, h, modulation, angles)
            if i < half:
                kept.append(h)
        h = self.out(self.norm(h))  # (B, N, c * merge^2)
        return spread_tokens(h, grid, self.merge, size)  # (B, c, h, w)
