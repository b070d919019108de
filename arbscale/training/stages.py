"""Training in four stages: autoencoder, LIIF decoder, diffusion, alignment.

In place of the autoencoder, an encoder may learn the latents of a published one.

Each stage is a function that returns its losses, one a step, and trains in place; the loop is in
`loop.py`, and its `Run` says where, how precisely and how often it saves. The seed decides
everything: initial weights are drawn by the caller, batches, times and noise by the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange

from arbscale.autoencoder import (
    Decoder,
    Encoder,
    FirstStage,
    GaussianPosterior,
    TinyDecoder,
    TinyEncoder,
)
from arbscale.coords import cell, grid
from arbscale.data import resize
from arbscale.diffusion import alignment_loss, denoising_loss
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset, build_decoder
from arbscale.training import latents
from arbscale.training.loop import Run, Stage, optimise, step_generator
from arbscale.training.sources import (
    Batch,
    Source,
)

POOL = 8192  # pictures encoded once for the diffusion model's training
POINTS = 1024  # of each target, where LIIF is compared with the truth


def train_autoencoder(
    encoder: Encoder | TinyEncoder,
    decoder: Decoder | TinyDecoder,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    run: Run | None = None,
) -> list[float]:
    """Pre-train the encoder with an ordinary up-sampling decoder, by L1 at one size.

    Where the latent is a Gaussian posterior it is sampled, and its divergence enters by
    `preset.kl_weight`, as in Rombach et al. 2022.
    """
    stage = AutoencoderStage(encoder, decoder, source, preset)
    return optimise(stage, steps, seed, run)


def distil_encoder(
    encoder: TinyEncoder,
    teacher: TinyEncoder,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    run: Run | None = None,
) -> list[float]:
    """Train an encoder to give the same latents (B, c, h, w) as its frozen teacher, by L1."""
    return optimise(StudentStage(encoder, teacher, source, preset), steps, seed, run)


def train_decoder(
    first_stage: FirstStage,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    freeze_encoder: bool = True,
    run: Run | None = None,
) -> list[float]:
    """Train the symmetric decoder and LIIF on the frozen encoder's latents.

    Each step draws a target size, uniform in `preset.target_sizes` as far as the pictures reach,
    and compares `POINTS` scattered pixels of each picture by L1, or all pixels of a window where
    `preset.crop` is set. LPIPS counts in full up to the encoder's input size, and less and less
    from there to four times that size, where it is left out. With `freeze_encoder=False` the
    encoder is trained along, as in the released code's default.
    Implements the first stage of Kim and Kim 2024.
    """
    stage = DecoderStage(first_stage, source, preset, freeze_encoder)
    return optimise(stage, steps, seed, run)


def train_first_stage(
    model: ArbitraryScaleModel,
    source: Source,
    autoencoder_steps: int,
    decoder_steps: int,
    seed: int = 0,
    joint: bool = False,
    run: Run | None = None,
) -> list[float]:
    """Pre-train the encoder, freeze it, train decoder and LIIF; return the latter's losses.

    With `joint` the encoder goes on learning in the second part. Either part may have no steps.
    """
    preset = model.preset
    if autoencoder_steps:
        helper = build_decoder(preset).to(model.device)
        encoder = model.first_stage.encoder
        train_autoencoder(encoder, helper, source, preset, autoencoder_steps, seed, run)
    return train_decoder(model.first_stage, source, preset, decoder_steps, seed, not joint, run)


def train_diffusion(
    model: ArbitraryScaleModel,
    source: Source,
    steps: int,
    seed: int = 0,
    pool: int | None = None,
    run: Run | None = None,
) -> list[float]:
    """Train the denoiser on latents of the frozen first stage, by the denoising loss, with EMA.

    `pool` pictures are encoded once and drawn from; by default all that the source has with their
    mirror images, or `POOL` where its crops vary. A run with a folder keeps the latents there. Sets
    `model.scale_factor`; the averaged weights end up in the model.
    """
    stage = DiffusionStage(model, source, pool)
    losses = optimise(stage, steps, seed, run)
    model.scale_factor = stage.scale_factor.item()
    return losses


def finetune_alignment(
    model: ArbitraryScaleModel,
    source: Source,
    steps: int,
    seed: int = 0,
    max_weight: float | None = None,
    run: Run | None = None,
) -> list[float]:
    """Fine-tune the denoiser through the frozen decoder, by the alignment loss, with EMA.

    `max_weight` clamps the image term's weight; None as in the paper. Implements the second stage
    of the diffusion model's training of Kim and Kim 2024.
    """
    return optimise(AlignmentStage(model, source, max_weight), steps, seed, run)


class AutoencoderStage(Stage):
    """Encoder and up-sampling decoder learn to give the picture back."""

    name, unit = "autoencoder", "images"

    def __init__(self, encoder: Encoder, decoder: Decoder, source: Source, preset: Preset):
        super().__init__()
        self.encoder, self.decoder = encoder.requires_grad_(True), decoder.requires_grad_(True)
        self.source, self.preset = source, preset
        self.batch, self.lr = preset.first_stage_batch, preset.first_stage_lr

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return pictures, and the posterior's noise."""
        image = _look(self.source, self.batch, generator, part).image(self.preset.image_size)
        return {"image": image, **_posterior_noise(self.preset, self.batch, generator, part)}

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the L1 error, with LPIPS and the divergence where they are wanted."""
        z, divergence = _sample_latent(self.encoder(image), noise)
        rgb = self.decoder(z)
        return (
            F.l1_loss(rgb, image)
            + self.preset.kl_weight * divergence
            + _perceptual(self.preset, rgb, image)
        )

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return four pictures, each beside its reconstruction."""
        image = self.source(4, torch.Generator().manual_seed(0)).image(self.preset.image_size)
        moments = self.encoder(image.to(next(self.parameters()).device))
        rgb = self.decoder(moments[:, : self.preset.latent_channels]).clamp(-1, 1)
        pairs = zip(image, rgb.float().cpu(), strict=True)
        return [(p, label) for a, b in pairs for p, label in ((a, "original"), (b, "decoded"))]


class StudentStage(Stage):
    """An encoder learns the latents of another one."""

    name, unit = "student", "images"

    def __init__(self, encoder: TinyEncoder, teacher: TinyEncoder, source: Source, preset: Preset):
        super().__init__()
        self.encoder, self.teacher = encoder.requires_grad_(True), teacher.requires_grad_(False)
        self.source, self.preset = source, preset
        self.batch, self.lr = preset.first_stage_batch, preset.first_stage_lr

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return images."""
        batch = _look(self.source, self.batch, generator, part)
        return {"image": batch.image(self.preset.image_size)}

    def forward(self, image: Tensor) -> Tensor:
        """Return the L1 error of the latents."""
        with torch.no_grad():
            z = self.teacher(image)
        return F.l1_loss(self.encoder(image), z)


class DecoderStage(Stage):
    """The symmetric decoder and LIIF learn to paint any pixel from a latent."""

    name, unit = "decoder", "images"

    def __init__(
        self, first_stage: FirstStage, source: Source, preset: Preset, freeze_encoder: bool
    ):
        super().__init__()
        self.first_stage, self.source, self.preset = first_stage, source, preset
        self.joint = not freeze_encoder
        first_stage.requires_grad_(True)
        first_stage.encoder.requires_grad_(self.joint)
        self.batch, self.lr = preset.first_stage_batch, preset.first_stage_lr

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return pictures, and points of them at a size that is drawn, with their colours."""
        preset = self.preset
        batch = _look(self.source, self.batch, generator, part)
        low, high = preset.target_sizes
        high = max(low, min(high, batch.largest or high))
        size = int(torch.randint(low, high + 1, (), generator=generator))
        sides = (0, preset.crop) if preset.crop else (0,)
        points = [_points(size, side, self.batch, generator)[part] for side in sides]
        coords = torch.cat(points, dim=1)  # (b, N, 2)
        noise = _posterior_noise(preset, self.batch, generator, part) if self.joint else {}
        return {
            "image": batch.image(preset.image_size),
            "coords": coords,
            "cells": cell((size, size)).expand(len(coords), 2),
            "colors": batch.colors(size, coords),
            **noise,
        }

    def forward(
        self,
        image: Tensor,
        coords: Tensor,
        cells: Tensor,
        colors: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the L1 error, with LPIPS of the windows and the divergence where wanted."""
        with contextlib.nullcontext() if self.joint else torch.no_grad():
            out = self.first_stage.encoder(image)
        if self.first_stage.has_posterior and not self.joint:
            out = GaussianPosterior.from_moments(out).mode
        z, divergence = _sample_latent(out, noise)
        rgb = self.first_stage.liif.query(self.first_stage.features(z), coords, cells)  # (B, N, 3)
        loss = F.l1_loss(rgb, colors) + self.preset.kl_weight * divergence
        if not self.preset.lpips_weight:
            return loss
        windows = (x[:, POINTS:].mT for x in (rgb, colors))  # (B, 3, side * side)
        side = math.isqrt(rgb.shape[1] - POINTS)
        pictures = (x.unflatten(-1, (side, side)) for x in windows)
        # What is finer than the encoder's input no latent holds: there LPIPS would invent.
        known = self.preset.image_size * cells[0, 0]  # twice the input's side over the target's
        return loss + known.clamp(max=1) ** 4 * _perceptual(self.preset, *pictures)

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return two pictures, each decoded at three sizes."""
        preset = self.preset
        image = self.source(2, torch.Generator().manual_seed(0)).image(preset.image_size)
        z = self.first_stage.encode(image.to(next(self.parameters()).device))
        features = self.first_stage.features(z)
        items = [(picture, "original") for picture in image]
        for size in _sizes(preset):
            rgb = self.first_stage.render(features, size).clamp(-1, 1).float().cpu()
            items += [(picture, f"{size} px") for picture in rgb]
        return items


class _DenoiserStage(Stage):
    """What the two stages share that train the denoiser beside a frozen first stage."""

    def __init__(self, model: ArbitraryScaleModel, source: Source):
        super().__init__()
        self.model, self.source, self.preset = model, source, model.preset
        model.first_stage.requires_grad_(False)
        model.denoiser.requires_grad_(True)
        factor = torch.tensor(model.scale_factor, dtype=torch.float64)
        self.register_buffer("scale_factor", factor)  # so that checkpoints hold it

    @property
    def averaged(self) -> nn.Module:
        """The denoiser."""
        return self.model.denoiser

    def prepare(self, run: Run, accelerator: Any, seed: int) -> None:
        """Let the U-Net save memory where the run asks for it."""
        self.model.denoiser.checkpointing = run.checkpointing
        self.model.scale_factor = self.scale_factor.item()

    def _times(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Draw steps (b,) uniformly, and noise (b, c, h, w)."""
        t = torch.randint(self.model.schedule.steps, (self.batch,), generator=generator)
        noise = torch.randn(_latent_shape(self.preset, self.batch), generator=generator)
        return {"t": t[part], "noise": noise[part]}

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return pictures from the same noise, or of the same low-resolution ones, at each size."""
        preset, model = self.preset, self.model
        if not preset.low_size:
            drawn = {size: model.generate(2, size, seed=0, steps=10) for size in _sizes(preset)}
        else:
            generator = torch.Generator().manual_seed(0)
            image = self.source(2, generator).image(preset.image_size)
            low = resize(image, preset.low_size)
            drawn = {size: model.upscale(low, size=size, steps=10) for size in _sizes(preset)}
        return [(p, f"{size} px") for size, batch in drawn.items() for p in batch.float().cpu()]


class DiffusionStage(_DenoiserStage):
    """The denoiser learns to see the noise in latents that were encoded beforehand."""

    name = "diffusion"

    def __init__(self, model: ArbitraryScaleModel, source: Source, pool: int | None):
        super().__init__(model, source)
        self.count = None if pool else getattr(source, "count", None)
        self.pool = pool or self.count or POOL
        self.batch, self.lr = self.preset.diffusion_batch, self.preset.diffusion_lr

    def prepare(self, run: Run, accelerator: Any, seed: int) -> None:
        """Encode the pool, or open it where it has been encoded before, and take its spread."""
        folder = run.latents or (run.folder and run.folder / "latents")
        identity = getattr(self.source, "identity", None)
        encoder = self.model.first_stage.encoder
        with accelerator.main_process_first():
            if folder and identity:
                shape = [self.preset.image_size, self.preset.low_size]
                shape += [self.count] if self.count else []
                key = latents.fingerprint(encoder, identity, self.pool, seed, shape)
                self.latents = latents.cached(folder, key, self.pool, lambda: self._parts(seed))
            else:
                self.latents = latents.in_memory(lambda: self._parts(seed))
        self.scale_factor.fill_(1 / self.latents.std())
        super().prepare(run, accelerator, seed)

    @torch.no_grad()
    def _parts(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Encode the pool, 64 pictures at a time: unscaled latents and conditions."""
        for start in trange(0, self.pool, 64, desc="encoding", unit="batch"):
            numbers = range(start, min(start + 64, self.pool))
            if self.count:
                batch = self.source.pick(numbers)
            else:
                batch = self.source(len(numbers), step_generator(seed, "pool", start))
            image, low = _with_low(batch, self.preset)
            yield tuple(z.cpu() for z in _encode(self.model, image, low))

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return latents of the pool, scaled, with conditions, steps and noise."""
        picks = torch.randint(len(self.latents), (self.batch,), generator=generator)
        scaled = [z * self.model.scale_factor for z in self.latents[picks[part]]]
        names = ("z0", "condition")[: len(scaled)]
        return {**dict(zip(names, scaled, strict=True)), **self._times(generator, part)}

    def forward(
        self, z0: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return the mean squared error of the noise, or of v."""
        model = self.model
        loss = denoising_loss(model.denoise(condition), z0, t, noise, model.schedule)  # (B,)
        if self.preset.prediction == "v":  # an error of v is sqrt(alpha_bar) times that of eps
            loss = loss / model.schedule.at(t, z0).flatten()
        return loss.mean()


class AlignmentStage(_DenoiserStage):
    """The denoiser learns what its errors look like once they are decoded."""

    name, unit = "alignment", "images"

    def __init__(self, model: ArbitraryScaleModel, source: Source, max_weight: float | None):
        super().__init__(model, source)
        self.max_weight = max_weight
        self.batch, self.lr = self.preset.first_stage_batch, self.preset.alignment_lr

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return pictures, low-resolution ones where there are conditions, steps and noise."""
        image, low = _with_low(_look(self.source, self.batch, generator, part), self.preset)
        lows = {} if low is None else {"low": low}
        return {"image": image, **lows, **self._times(generator, part)}

    def forward(self, image: Tensor, t: Tensor, noise: Tensor, low: Tensor | None = None) -> Tensor:
        """Return the sum of the latent and the image term."""
        model = self.model
        with torch.no_grad():
            z0, *rest = (z * model.scale_factor for z in _encode(model, image, low))
        latent_term, image_term = alignment_loss(
            model.denoise(*rest), self._decode, z0, image, t, noise, model.schedule, self.max_weight
        )
        return (latent_term + image_term).mean()

    def _decode(self, z: Tensor) -> Tensor:
        return self.model.first_stage.decode(z / self.model.scale_factor, self.preset.image_size)


def _look(source: Source, n: int, generator: torch.Generator, part: slice) -> Batch:
    """Draw n pictures and look at a part; a source that knows no parts is asked for all."""
    if part == slice(0, n):
        return source(n, generator)
    return source(n, generator, part)


def _with_low(batch: Batch, preset: Preset) -> tuple[Tensor, Tensor | None]:
    image = batch.image(preset.image_size)
    return image, resize(image, preset.low_size) if preset.low_size else None


def _encode(model: ArbitraryScaleModel, image: Tensor, low: Tensor | None) -> tuple[Tensor, ...]:
    """Return unscaled latents and, for super-resolution, unscaled conditions."""
    z = model.first_stage.encode(image.to(model.device))
    if low is None:
        return (z,)
    return z, model.condition(low.to(model.device)) / model.scale_factor


def _latent_shape(preset: Preset, n: int) -> tuple[int, ...]:
    return (n, preset.latent_channels, preset.latent_size, preset.latent_size)


def _posterior_noise(
    preset: Preset, n: int, generator: torch.Generator, part: slice
) -> dict[str, Tensor]:
    """Draw what the posterior is sampled with, where there is one."""
    if not preset.posterior:
        return {}
    return {"noise": torch.randn(_latent_shape(preset, n), generator=generator)[part]}


def _sample_latent(out: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Turn the encoder's output into a latent and its mean divergence; without noise it is one."""
    if noise is None:
        return out, 0.0
    posterior = GaussianPosterior.from_moments(out)
    return posterior.mean + (0.5 * posterior.logvar).exp() * noise, posterior.kl().mean()


def _points(size: int, crop: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw pixel centres (n, N, 2) of a square picture: scattered, or those of a window each."""
    centres = grid((size, size))  # (size, size, 2)
    if not crop:
        picks = torch.randint(size * size, (n, POINTS), generator=generator)
        return centres.view(-1, 2)[picks]
    side = min(crop, size)
    corners = torch.randint(size - side + 1, (n, 2), generator=generator).tolist()
    windows = [centres[y : y + side, x : x + side] for y, x in corners]
    return torch.stack(windows).flatten(1, 2)


def _perceptual(preset: Preset, rgb: Tensor, target: Tensor) -> Tensor | float:
    """Weighted LPIPS of pictures (B, 3, H, W), where the preset asks for it."""
    if not preset.lpips_weight:
        return 0.0
    from arbscale.metrics import lpips_network

    network = lpips_network("alex").to(rgb.device).requires_grad_(False)
    return preset.lpips_weight * network(rgb, target).mean()


def _sizes(preset: Preset) -> tuple[int, int, int]:
    """Sizes of the samples: below, at and above that of training."""
    return preset.image_size // 2, preset.image_size, 2 * preset.image_size
