"""A patch discriminator, which the decoder learns to deceive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = (64, 128, 256)


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
