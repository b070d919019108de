"""Losses of windows of the rendered image, beside L1; one is a patch discriminator's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from arbscale.presets import Preset

WIDTHS = (64, 128, 256)  # of the discriminator
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

    network = lpips_network().to(rgb.device).requires_grad_(False)
    return preset.lpips_weight * network(rgb, target).mean()


class PatchDiscriminator(nn.Module):
    """Says of each patch of windows (B, 3, s, s) how real it looks: logits (B, 1, s', s').

    Three convolutions halve the sides: s' is s/8, and a patch has 38 px. How sharp an image is
    depends on its scale, so `scale` is a fourth channel: log2 of the image's side over the
    encoder's input. As in Isola et al. 2017 (pix2pix), with spectral normalisation (Miyato et al.
    2018) in place of batch normalisation.
    """

    def __init__(self) -> None:
        super().__init__()
        layers, width = [], 4
        for wider in WIDTHS:
            layers += [spectral_norm(nn.Conv2d(width, wider, 4, 2, 1)), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, 3, padding=1)))

    def forward(self, windows: Tensor, scale: Tensor) -> Tensor:
        """Judge windows of an image at one scale (a scalar)."""
        return self.layers(torch.cat([windows, scale.expand_as(windows[:, :1])], dim=1))

    def losses(self, made: Tensor, real: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's loss for its windows `made` (B, 3, s, s), and this network's own.

        The hinge loss of Lim and Ye 2017. Neither has a gradient in the other's parameters, so one
        optimiser can take the sum.
        """
        fixed = {name: p.detach() for name, p in self.named_parameters()}
        deceived = -functional_call(self, fixed, (made, scale)).mean()
        judged = [self(x, scale) for x in (real, made.detach())]
        return deceived, (F.relu(1 - judged[0]) + F.relu(1 + judged[1])).mean() / 2
