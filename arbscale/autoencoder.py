"""Encoder, up-sampling decoder, and the symmetric decoder that does not up-sample.

The residual layout (two 3x3 convolutions with group normalisation and SiLU, attention in the
middle) follows the autoencoder of Rombach et al. 2022; the symmetric decoder is Kim and Kim 2024;
the tiny encoder and decoder are those of TAESD (Ollin Boer Bohan, github madebyollin/taesd).
`FirstStage` is the whole: image -> latent -> features -> image of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arbscale.coords import Size, Window, check_size, check_window
from arbscale.liif import LIIF, InterpolatedLIIF
from arbscale.store import InputError, StateError
from arbscale.unet import attend, zeroed

EPS = 1e-6  # of group normalisation in the first stage


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=EPS)


def _conv(in_channels: int, out_channels: int, kernel: int, **options: Any) -> nn.Conv2d:
    """Make a convolution that keeps a signal's strength (He et al. 2015).

    PyTorch's own draw of the weights leaves a third of the variance behind each layer, and a
    network so deep is slow to begin to learn.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel, **options)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """(B, in_channels, h, w) -> (B, out_channels, h, w).

    `padding` is what lies beyond the border, one of `nn.Conv2d`'s `padding_mode`s.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int = 32, padding: str = "zeros"
    ):
        super().__init__()
        options = {"padding": 1, "padding_mode": padding}
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = _conv(in_channels, out_channels, 3, **options)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = zeroed(_conv(out_channels, out_channels, 3, **options))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's correction to a (possibly projected) copy of the input."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out_channels, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, (B, C, h, w) -> (B, C, h, w)."""

    window: int | None = None  # side of what a position reads, where it is not all

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, out = (_conv(channels, channels, 1) for _ in range(4))
        self.out = zeroed(out)

    def forward(self, x: Tensor) -> Tensor:
        """Let every position read from every other one."""
        h = self.norm(x)
        # Contiguous, or PyTorch falls back to a form that holds all (h*w)^2 weights.
        qkv = (f(h).flatten(2).mT.contiguous()[:, None] for f in (self.q, self.k, self.v))
        h = attend(*qkv, tuple(x.shape[-2:]), self.window)[:, 0]  # (B, h*w, C)
        return x + self.out(h.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the size by a strided convolution that pads right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h // 2, w // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest neighbour, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _levels(
    widths: list[int], blocks: int, attention: list[bool], groups: int, padding: str = "zeros"
) -> nn.ModuleList:
    """Make levels of `blocks` residual blocks, from each width to the next, some with attention."""
    levels = nn.ModuleList()
    for before, width, attends in zip(widths, widths[1:], attention, strict=False):
        levels.append(nn.Sequential())
        for i in range(blocks):
            levels[-1].append(ResidualBlock(width if i else before, width, groups, padding))
            if attends:
                levels[-1].append(Attention(width, groups))
    return levels


def _middle(channels: int, groups: int, padding: str = "zeros") -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups, padding),
        Attention(channels, groups),
        ResidualBlock(channels, channels, groups, padding),
    )


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> latent (B, c, H/f, W/f), f = 2 ** (levels - 1).

    Parameters
    ----------
    channels
        Width of the first level, a multiple of 32.
    multipliers
        Width of each level as a multiple of `channels`; between levels the size is halved.
    blocks
        Residual blocks per level.
    latent_channels
        c. The output has 2 c channels (mean, log variance) when `posterior` is set.
    posterior
        Whether the latent is a Gaussian posterior.
    attention_levels
        Levels with attention after each block; the middle has it always.
    groups
        Of group normalisation, 32 as published. A narrow network wants fewer: with one or two
        channels per group the normalisation wipes out brightness and contrast.

    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        latent_channels: int = 3,
        posterior: bool = False,
        attention_levels: tuple[int, ...] = (),
        groups: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        out_channels = latent_channels * (2 if posterior else 1)
        self.factor = 2 ** (len(widths) - 1)
        self.stem = _conv(3, channels, 3, padding=1)
        attention = [i in attention_levels for i in range(len(widths))]
        self.levels = _levels([channels, *widths], blocks, attention, groups)
        self.downs = nn.ModuleList(map(Downsample, widths[:-1]))
        self.middle = _middle(widths[-1], groups)
        self.norm = _norm(widths[-1], groups)
        self.conv = _conv(widths[-1], out_channels, 3, padding=1)
        self.head = _conv(out_channels, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images whose sides are multiples of `factor`; ValueError otherwise."""
        _check_sides(image, self.factor)
        h = self.stem(image)  # (B, channels, H, W)
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.downs):
                h = self.downs[i](h)  # (B, width, H / 2**(i+1), W / 2**(i+1))
        h = self.conv(F.silu(self.norm(self.middle(h))))  # (B, c or 2c, H/f, W/f)
        return self.head(h)


class SymmetricDecoder(nn.Module):
    """The encoder's mirror without up-sampling: latent (B, c, h, w) -> features (B, C, h, w).

    Every level works at the latent's own resolution; neither the last normalisation nor the output
    convolution is there, so LIIF gets the narrowest level's `channels` channels.
    Implements the symmetric decoder of Kim and Kim 2024. Parameters as in `Encoder`; `padding` as
    in `ResidualBlock`: zeros as published, which draw a frame into the images of a small decoder.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 4),
        blocks: int = 2,
        latent_channels: int = 3,
        attention_levels: tuple[int, ...] = (),
        groups: int = 32,
        padding: str = "zeros",
    ):
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        self.stem = nn.Sequential(
            _conv(latent_channels, latent_channels, 1),
            _conv(latent_channels, widths[0], 3, padding=1, padding_mode=padding),
        )
        self.middle = _middle(widths[0], groups, padding)
        attention = [i in attention_levels for i in reversed(range(len(widths)))]
        self.levels = _levels([widths[0], *widths], blocks + 1, attention, groups, padding)

    def forward(self, z: Tensor) -> Tensor:
        """Compute the features once; LIIF renders them as often as wished."""
        h = self.middle(self.stem(z))  # (B, widest, h, w)
        for level in self.levels:
            h = level(h)
        return h  # (B, channels, h, w)


class Decoder(SymmetricDecoder):
    """The ordinary up-sampling decoder: latent (B, c, H/f, W/f) -> image (B, 3, H, W).

    The encoder is pre-trained against it; it knows one output size only. Parameters as in
    `SymmetricDecoder`.
    """

    def __init__(
        self, channels: int = 128, multipliers: tuple[int, ...] = (1, 2, 4), *rest: Any, **more: Any
    ):
        super().__init__(channels, multipliers, *rest, **more)
        self.ups = nn.ModuleList(Upsample(channels * m) for m in reversed(multipliers[1:]))
        self.norm = _norm(channels * multipliers[0], self.middle[0].norm1.num_groups)
        self.conv = _conv(channels * multipliers[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode to the one size that the encoder came from."""
        h = self.middle(self.stem(z))
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.ups):
                h = self.ups[i](h)  # (B, width, 2**(i+1) h, 2**(i+1) w)
        return self.conv(F.silu(self.norm(h)))


class TinyBlock(nn.Module):
    """Three 3x3 convolutions added to their input, (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        first, second, third = (_conv(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), zeroed(third))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's correction, and cut below zero."""
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> latent (B, c, H/8, W/8), by 3x3 convolutions alone.

    TAESD's encoder: with its published weights (`compat.tiny_encoder`) the latent space is that
    of Stable Diffusion's autoencoder.
    """

    factor = 8

    def __init__(self, channels: int = 64, latent_channels: int = 4):
        super().__init__()
        layers: list[nn.Module] = [_conv(3, channels, 3, padding=1), TinyBlock(channels)]
        for _ in range(3):
            layers.append(_conv(channels, channels, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(channels) for _ in range(3)]
        self.layers = nn.Sequential(*layers, _conv(channels, latent_channels, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """Encode images whose sides are multiples of 8; ValueError otherwise."""
        _check_sides(image, self.factor)
        return self.layers((image + 1) / 2)  # (B, c, H/8, W/8); the layers take [0, 1]


class TinyDecoder(nn.Module):
    """Latent (B, c, h, w) -> image (B, 3, 8h, 8w), about [-1, 1]: TAESD's up-sampling decoder."""

    def __init__(self, channels: int = 64, latent_channels: int = 4):
        super().__init__()
        layers: list[nn.Module] = [_conv(latent_channels, channels, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [TinyBlock(channels) for _ in range(3)]
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(_conv(channels, channels, 3, padding=1, bias=False))
        layers += [TinyBlock(channels), _conv(channels, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode to the one size that the encoder came from."""
        return 2 * self.layers(3 * torch.tanh(z / 3)) - 1  # far outliers are drawn in


def _check_sides(image: Tensor, factor: int) -> None:
    if image.shape[-2] % factor or image.shape[-1] % factor:
        size = "{} x {}".format(*image.shape[-2:])
        raise InputError(f"the encoder takes sides that are multiples of {factor}, got {size}")


@dataclass(frozen=True)
class GaussianPosterior:
    """A diagonal Gaussian over latents: mean and log variance, each (B, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> GaussianPosterior:
        """Split (B, 2c, h, w); the log variance is clamped to [-30, 20] against overflow."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    @property
    def mode(self) -> Tensor:
        """The most likely latent (B, c, h, w), which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, c, h, w); the noise is drawn on the CPU."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to N(0, 1), mean over latent dimensions, shape (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.mean(dim=(1, 2, 3))


class FirstStage(nn.Module):
    """Encoder, symmetric decoder and LIIF together.

    `features` is slow and wanted once for a latent; `render` is fast and wanted often.
    `posterior` tells whether the encoder's output holds the moments of a Gaussian. LIIF has seen no
    size below `coarsest` image pixels for each latent pixel: such an image is the average of a
    larger one.
    """

    def __init__(
        self,
        encoder: Encoder | TinyEncoder,
        decoder: SymmetricDecoder,
        liif: LIIF | InterpolatedLIIF,
        posterior: bool = False,
        coarsest: float = 0.0,
    ):
        super().__init__()
        self.encoder, self.decoder, self.liif = encoder, decoder, liif
        self.has_posterior, self.coarsest = posterior, coarsest

    @property
    def factor(self) -> int:
        """How many image pixels one latent pixel spans."""
        return self.encoder.factor

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> unscaled latent (B, c, H/f, W/f).

        It is the posterior's mode if there is one. H and W must be multiples of `factor`.
        """
        return self.posterior(image).mode if self.has_posterior else self.encoder(image)

    def posterior(self, image: Tensor) -> GaussianPosterior:
        """Return the Gaussian over latents; RuntimeError where latents are deterministic."""
        if not self.has_posterior:
            raise StateError("this first stage has no posterior; call encode")
        return GaussianPosterior.from_moments(self.encoder(image))

    def features(self, z: Tensor) -> Tensor:
        """Latent (B, c, h, w) -> the features (B, C, h, w) that `render` reads."""
        return self.decoder(z)

    def render(self, features: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Features (B, C, h, w) -> image (B, 3, H, W) of any size; see `LIIF.render`."""
        height, width = size = check_size(size)
        pixels = min(height / features.shape[-2], width / features.shape[-1])
        n = math.ceil(self.coarsest / pixels - 1e-6)
        if n <= 1:
            return self.liif.render(features, size, window)
        top, left, *sides = (n * x for x in check_window(window, size))
        larger = self.liif.render(features, (n * height, n * width), (top, left, *sides))
        return F.avg_pool2d(larger, n)

    def decode(self, z: Tensor, size: int | Size, window: Window | None = None) -> Tensor:
        """Latent (B, c, h, w) -> image (B, 3, H, W) of any size, or a window of it."""
        return self.render(self.features(z), size, window)
