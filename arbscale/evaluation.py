"""Scores of a model on unseen pictures, beside its baselines."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arbscale import metrics
from arbscale.coords import scaled_size
from arbscale.images import low_high_pair, resize, to_uint8
from arbscale.model import ArbitraryScaleModel, back_project
from arbscale.scenes import render_scenes, sample_scenes
from arbscale.tiles import Tile

Rows = dict[str, Tensor]
"""Pictures by method, all of one size (1, 3, H, W); "truth" is the reference."""


def eight_bits(image: Tensor) -> Tensor:
    """Round a picture in [-1, 1] to 8 bits, as a file would."""
    return to_uint8(image).float() / 127.5 - 1


def scene_rows(model: ArbitraryScaleModel, index: int, scale: float) -> Rows:
    """Reconstruct a test scene at `scale` times the training size.

    The truth is the scene itself, rendered at that size. The baseline enlarges the model's own
    training-size output by bicubic interpolation, which is all that a fixed-size decoder offers.
    """
    side = model.preset.image_size
    scenes = sample_scenes(1, seed=0, first=(1 << 29) + index)
    z = model.first_stage.encode(render_scenes(scenes, side).to(model.device))
    features = model.first_stage.features(z)
    size = scaled_size((side, side), scale)
    own, ours = (model.first_stage.render(features, s).clamp(-1, 1).cpu() for s in (side, size))
    return {
        "truth": render_scenes(scenes, size),
        "bicubic of own training-size output": resize(eight_bits(own), size),
        "ours (first stage)": ours,
    }


def photo_rows(model: ArbitraryScaleModel, image: Tensor, scale: float, seed: int) -> Rows:
    """Reduce a photograph (3, H, W) by `scale` with antialiased bicubic, then enlarge it again.

    The ceiling encodes the photograph itself instead of sampling its latent, tile by tile. It and
    ours are back-projected; so is one bicubic baseline, to show what that step alone gives.
    """
    low, high = low_high_pair(image, scale)
    low = eight_bits(low)
    factor = model.preset.image_size // model.preset.low_size
    given = resize(high, (low.shape[1] * factor, low.shape[2] * factor))[None]
    size = tuple(high.shape[-2:])

    def latent(_: Tensor, span: Tile, __: object) -> Tensor:
        rows, columns = (
            slice(a * factor, b * factor)
            for a, b in ((span.top, span.bottom), (span.left, span.right))
        )
        return model.first_stage.encode(given[..., rows, columns].to(model.device))

    bicubic = resize(low, size)
    return {
        "truth": high[None],
        "bicubic": bicubic[None],
        "bicubic, back-projected": back_project(bicubic, low).clamp(-1, 1)[None],
        "ours": model.upscale(low, size=size, seed=seed)[None],
        "first stage (ceiling)": model.paint(low, size, latent)[None],
    }


def score(rows: Rows, space: str, border: int, with_lpips: bool) -> dict[str, dict[str, float]]:
    """Compare each method with the truth."""
    truth = rows["truth"]
    measures: dict[str, Callable[[Tensor], float]] = {
        "psnr": lambda x: metrics.psnr(x, truth, space, border),
        "ssim": lambda x: metrics.ssim(x, truth, space, border),
    }
    if with_lpips:
        measures["lpips"] = lambda x: metrics.lpips(eight_bits(x), eight_bits(truth))
    return {
        method: {name: measure(picture) for name, measure in measures.items()}
        for method, picture in rows.items()
        if method != "truth"
    }


@torch.no_grad()
def evaluate(
    model: ArbitraryScaleModel,
    images: Sequence[Tensor] | None,
    scales: Iterable[float],
    n: int,
    seed: int = 0,
) -> dict:
    """Score a model at several scales.

    Parameters
    ----------
    model
        A generator (its first stage is scored on scenes) or a super-resolution model.
    images
        Photographs (3, H, W) for a super-resolution model; None for scenes.
    scales
        Positive factors.
    n
        Number of pictures, from the first on.
    seed
        Of the sampler.

    Returns
    -------
    dict
        The protocol, and under `results` a mean for each scale, method and metric.

    """
    with_lpips = metrics.lpips_is_there()
    reduced = "exact rendering" if images is None else "antialiased bicubic, 8 bits"
    results: dict[str, dict] = {}
    for scale in scales:
        totals: dict[str, dict[str, list[float]]] = {}
        for i in tqdm(range(n), desc=f"x{scale:g}", unit="picture"):
            if images is None:
                rows = scene_rows(model, i, scale)
            else:
                rows = photo_rows(model, images[i], scale, seed)
            for method, values in score(rows, "rgb", 0, with_lpips).items():
                for name, value in values.items():
                    totals.setdefault(method, {}).setdefault(name, []).append(value)
        results[f"{scale:g}"] = {
            method: {name: sum(v) / len(v) for name, v in values.items()}
            for method, values in totals.items()
        }
    return {
        "model": model.manifest.get("name", model.preset.name),
        "weights": [entry["sha256"] for entry in model.manifest.get("files", [])],
        "protocol": {
            "images": n,
            "low resolution": reduced,
            "psnr and ssim": "RGB, no border, whole images, 8 bits, mean of per-image values",
            "lpips": "v0.1, AlexNet" if with_lpips else None,
            "sampler": None if images is None else "dpm_solver_pp, 10 steps",
            "seed": seed,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": model.device.type,
        "results": results,
    }


def table(report: dict) -> str:
    """Write a report's results as a markdown table."""
    names = ["psnr", "ssim"] + ["lpips"] * bool(report["protocol"]["lpips"])
    titles = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
    lines = [
        "| scale | method | " + " | ".join(titles[name] for name in names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    digits = {"psnr": 2, "ssim": 4, "lpips": 4}
    for scale, methods in report["results"].items():
        for method, values in methods.items():
            cells = " | ".join(f"{values[name]:.{digits[name]}f}" for name in names)
            lines.append(f"| x{scale} | {method} | {cells} |")
    return "\n".join(lines)
