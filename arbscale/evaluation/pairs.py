"""Scores of images against their ground truth: reconstruction and upscaling, with baselines."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from arbscale import metrics
from arbscale.coords import Size, scaled_size
from arbscale.data import (
    ContinuousScenes,
    low_high_pair,
    random_crop,
    render_scenes,
    resize,
    sample_scenes,
    to_uint8,
)
from arbscale.evaluation.resume import Partial, shared
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import Sampling
from arbscale.store import InputError
from arbscale.tiles import Tile, back_project

Rows = dict[str, Tensor]
"""Images by method, all of one size (1, 3, H, W); "truth" is the reference."""

OWN = "bicubic of own training-size output"
HALF = "bicubic of own output at half the size"


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


@torch.no_grad()
def reconstruction_rows(
    model: ArbitraryScaleModel, images: Sequence[Tensor], index: int, scale: float, rule: Protocol
) -> Rows:
    """Encode a small image and render it `scale` times larger.

    Scenes are encoded at the training size, and the truth is the scene itself at the larger size.
    Of a photograph the small image is the reduction that the protocol asks for, cropped to whole
    latent pixels. The baselines enlarge the small image; the model's own output at the small size,
    which is all that a fixed-size decoder offers; and from x4 on its output at half the size.
    """
    if isinstance(images, ContinuousScenes):
        if rule.low_size:
            text = f"{rule.name} fixes the low size; scenes take whole, benchmark or div2k"
            raise InputError(text)
        scene, side = sample_scenes(1, images.seed, images.first + index), model.preset.image_size
        low = eight_bits(render_scenes(scene, side)[0])
        high = render_scenes(scene, scaled_size((side, side), scale))[0]
    else:
        low, high = rule.pair(images[index], scale, index)
        factor = model.first_stage.factor
        if min(low.shape[-2:]) < factor:
            found = "{} x {} is smaller than a latent pixel".format(*low.shape[-2:])
            raise InputError(f"{found}, {factor} px; take a smaller scale")
        sides = tuple(n // factor * factor for n in low.shape[-2:])  # whole latent pixels
        rows, columns = scaled_size(sides, scale)
        high = high[..., :rows, :columns]
        low = eight_bits(resize(high, sides))
    features = model.first_stage.features(model.first_stage.encode(low[None].to(model.device)))
    size = tuple(high.shape[-2:])

    def render(size: Size) -> Tensor:
        return model.first_stage.render(features, size).clamp(-1, 1).cpu()

    rows = {"bicubic": low[None], OWN: eight_bits(render(tuple(low.shape[-2:])))}
    if scale >= 4:
        rows[HALF] = eight_bits(render(scaled_size(size, 0.5)))
    enlarged = {method: resize(image, size) for method, image in rows.items()}
    return {"truth": high[None], **enlarged, "ours (first stage)": render(size)}


@torch.no_grad()
def upscaling_rows(
    model: ArbitraryScaleModel,
    image: Tensor,
    scale: float,
    rule: Protocol,
    sampling: Sampling,
    index: int = 0,
    precision: str = "float32",
) -> Rows:
    """Reduce a photograph (3, H, W) as the protocol says, then enlarge it again.

    The ceiling encodes the photograph itself instead of sampling its latent, tile by tile. It and
    ours are back-projected; so is one bicubic baseline, to show what that step alone gives.
    `precision` is that of ours, as in `model.upscale`.
    """
    low, high = rule.pair(image, scale, index)
    factor, zoom = model.first_stage.factor, model.zoom
    given = resize(high, tuple(factor * max(1, round(n * zoom)) for n in low.shape[-2:]))[None]
    size = tuple(high.shape[-2:])

    def encoded(span: Tile) -> Tensor:
        _, rows, columns = span.latent(zoom)
        ends = rows.start, columns.start, rows.stop, columns.stop
        border = factor * round(span.border * zoom)  # in pixels of the encoder's input
        part = Tile(*(factor * n for n in ends), 0, 0, 0, border).cut(given)
        return model.first_stage.encode(part.to(model.device))

    encodings = ((span, encoded(span)) for span in model.tiles(low.shape[-2:]))
    bicubic = resize(low, size)
    return {
        "truth": high[None],
        "bicubic": bicubic[None],
        "bicubic, back-projected": back_project(bicubic, low).clamp(-1, 1)[None],
        "ours": model.upscale(low, size=size, **asdict(sampling), precision=precision)[None],
        "first stage (ceiling)": model.paint(low, size, encodings)[None],
    }


def score(rows: Rows, space: str, border: int, with_lpips: bool) -> dict[str, dict[str, float]]:
    """Compare each method with the truth."""
    truth, scores = rows["truth"], {}
    for method, image in rows.items():
        if method == "truth":
            continue
        scores[method] = {
            "psnr": metrics.psnr(image, truth, space, border),
            "ssim": metrics.ssim(image, truth, space, border),
        }
        if with_lpips:
            scores[method]["lpips"] = metrics.lpips(eight_bits(image), eight_bits(truth))
    return scores


def evaluate_pairs(
    rows: Callable[[int, float], Rows],
    rule: Protocol,
    scales: Iterable[float],
    n: int,
    partial: Partial,
    with_lpips: bool,
    name: Callable[[int], str] = "image {}".format,
) -> dict[str, dict]:
    """Score `rows(index, scale)` for the first n images at each scale.

    Returns, by scale and method, the mean of each metric. Finished images are kept in `partial`.
    Raises ValueError that says which image it is that cannot be scored, and at which scale.
    """

    def scored(index: int, scale: float) -> dict[str, dict[str, float]]:
        try:
            return score(rows(index, scale), rule.space, rule.border(scale), with_lpips)
        except InputError as error:
            raise InputError(f"{name(index)} at x{spell(scale)}: {error}") from error

    results: dict[str, dict] = {}
    for scale in dict.fromkeys(scales):
        spelt = spell(scale)

        def kept(index: int, scale: float = scale, spelt: str = spelt) -> dict:
            return partial.numbers(f"x{spelt}-{index:06d}", lambda: scored(index, scale))

        scores = shared(kept, range(n), f"x{spelt}", "image")
        results[spelt] = {
            method: {name: sum(s[method][name] for s in scores) / n for name in values}
            for method, values in scores[0].items()
        }
    return results


def spell(scale: float) -> str:
    """Return a scale's shortest spelling that no other scale has, such as "2" or "3.7"."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(float(scale))


def lpips_or_why_not() -> bool:
    """Tell whether LPIPS can be computed; where its weights cannot be had, say so on stderr."""
    try:
        metrics.lpips(*torch.zeros(2, 3, 32, 32))
    except FileNotFoundError as error:
        print(f"without LPIPS: {error}", file=sys.stderr)
        return False
    return True


def pair_protocol(
    rule: Protocol, images: Sequence[Tensor], task: str, n: int, sampling: Sampling, lpips: bool
) -> dict:
    """Return the protocol of `evaluate_pairs` as JSON can hold it."""
    choices = {"pictures": n, **rule.describe()}
    if task == "reconstruct" and isinstance(images, ContinuousScenes):
        choices["low"] = "exact rendering at the training size, 8 bits; the truth is exact too"
    choices["lpips"] = "v0.1, AlexNet, whole images, 8 bits" if lpips else None
    choices["sampling"] = asdict(sampling) if task == "upscale" else None
    return choices
