"""What a number was measured on: the choices of super-resolution tables, by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from arbscale.coords import scaled_size
from arbscale.data import low_high_pair, random_crop, resize, to_uint8
from arbscale.store import InputError


@dataclass(frozen=True)
class Protocol:
    """How a photograph becomes a low and a high image, and how two images are compared.

    The low image is always the antialiased bicubic reduction (PIL, a = -0.5), rounded to 8 bits.
    """

    name: str
    space: str  # of PSNR and SSIM: "rgb" or "y"
    shave: int | None  # border left out beyond the scale rounded up, in pixels; None: no border
    low_size: int | None = None  # side of the low image where it is fixed
    crop: bool = False  # a fixed low size comes from a random crop, not from the whole square

    def border(self, scale: float) -> int:
        """Return the pixels left out on each side for PSNR and SSIM."""
        return 0 if self.shave is None else math.ceil(scale) + self.shave

    def pair(self, image: Tensor, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the low and the high image of a photograph (3, H, W).

        Whole photographs lose their last rows and columns, so that the high size is the scale times
        the low one, rounded. With a fixed low size the photograph is cropped to a centred square
        and reduced, or cropped at random (`seed`) where the protocol says so. ValueError where the
        photograph is too small.
        """
        if self.low_size is None:
            low, high = low_high_pair(image, scale)
            return eight_bits(low), high
        side = scaled_size((self.low_size,) * 2, scale)[0]
        if min(image.shape[-2:]) < side:
            found = "{} x {}".format(*image.shape[-2:])
            raise InputError(f"{self.name} at x{scale:g} needs images from {side} px, got {found}")
        if self.crop:
            high = random_crop(image, side, torch.Generator().manual_seed(seed))
        else:
            high = resize(centre_crop(image, (1, 1)), side)
        return eight_bits(resize(high, self.low_size)), high

    def describe(self) -> dict:
        """Return the choices as JSON can hold them."""
        return {
            **asdict(self),
            "crop": "at random, seeded by the image's number" if self.crop else None,
            "low": "antialiased bicubic (PIL, a = -0.5), 8 bits",
            "psnr and ssim": "8 bits, mean of per-image values",
        }


_ALL = (
    Protocol("whole", "rgb", None),
    Protocol("benchmark", "y", 0),  # Set5 and its like
    Protocol("div2k", "rgb", 6),
    Protocol("paper_faces", "rgb", None, low_size=16),
    Protocol("faces_128", "rgb", None, low_size=128),
    Protocol("paper_div2k", "rgb", None, low_size=48, crop=True),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def get_protocol(name: str) -> Protocol:
    """Return the protocol of that name; ValueError lists the names."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; take one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def eight_bits(image: Tensor) -> Tensor:
    """Round an image in [-1, 1] to 8 bits, as a file would."""
    return to_uint8(image).float() / 127.5 - 1


def centre_crop(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the largest centred part (..., h, w) of that aspect ratio, height to width."""
    height, width = image.shape[-2:]
    scale = min(height / shape[0], width / shape[1])
    h, w = (min(n, max(1, round(scale * m))) for n, m in zip((height, width), shape, strict=True))
    top, left = (height - h) // 2, (width - w) // 2
    return image[..., top : top + h, left : left + w]
