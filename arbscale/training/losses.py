"""Losses of windows of the rendered image, beside L1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbscale.presets import Preset

HARMONICS = 4  # of the latent grid's frequency, along each axis


def lattice(rgb: Tensor, target: Tensor, coords: Tensor, n: int) -> Tensor | float:
    """Energy of what repeats with each of n x n latent pixels in windows (B, 3, s, s).

    LPIPS takes dots and dashes at one place of every latent pixel for texture. Neither the colour's
    error nor the sharpness, the absolute value of the Laplacian, should depend on the place in the
    latent pixel: their means over the batch as functions of that place are given by their Fourier
    coefficients at the grid's frequency and its harmonics. `coords` (B, s, s, 2) are the pixels'
    centres.
    """
    period = 2 / n / float(coords[0, 1, 0, 0] - coords[0, 0, 0, 0])  # in pixels
    most = min(HARMONICS, int(period / 2 + 1e-3))  # as far as pixels can tell
    if not most:
        return 0.0
    inner = slice(1, -1)
    both = torch.cat([(rgb - target)[..., inner, inner], _laplacian(rgb).abs()], dim=1)
    both = both - both.mean(dim=(2, 3), keepdim=True)
    both = both.movedim(1, -1).flatten(0, -2)  # (B*(s - 2)**2, 6)
    k = torch.arange(-most, most + 1, device=coords.device)
    turns = (coords[:, inner, inner, :, None] + 1) * (math.pi * n) * k  # (B, s - 2, s - 2, 2, k)
    y, x = torch.polar(torch.ones_like(turns), turns).unbind(-2)
    waves = (y[..., :, None] * x[..., None, :]).flatten(0, 2).flatten(1)  # (B*(s - 2)**2, k*k)
    waves = waves[:, : len(k) ** 2 // 2]  # without the constant, and one of each conjugate pair
    mean = waves.mT @ both.to(waves) / len(waves)  # (waves, 6)
    return mean.abs().square().sum()


def _laplacian(image: Tensor) -> Tensor:
    """Four times each inner pixel less its neighbours: (..., s, s) -> (..., s - 2, s - 2)."""
    rows = 2 * image[..., 1:-1, :] - image[..., :-2, :] - image[..., 2:, :]
    cols = 2 * image[..., :, 1:-1] - image[..., :, :-2] - image[..., :, 2:]
    return rows[..., 1:-1] + cols[..., 1:-1, :]


def perceptual(preset: Preset, rgb: Tensor, target: Tensor) -> Tensor | float:
    """Weighted LPIPS of images (B, 3, H, W), where the preset asks for it."""
    if not preset.lpips_weight:
        return 0.0
    from arbscale.metrics import lpips_network

    network = lpips_network("alex").to(rgb.device).requires_grad_(False)
    return preset.lpips_weight * network(rgb, target).mean()
