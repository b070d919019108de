"""Training the first stage: autoencoder, or an encoder that learns from another; then LIIF.

Each stage is a function that trains in place and returns the loss of each step; the loop is in
`loop.py`, and its `Run` says where, how precisely and how often it saves. The caller draws the
initial weights; batches, times and noise are drawn by the seed and the step alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset, build_decoder
from arbscale.training.draws import step_generator
from arbscale.training.loop import Run, Stage, optimise
from arbscale.training.losses import PatchDiscriminator, lattice, perceptual
from arbscale.training.pruning import inherit
from arbscale.training.resample import Resample
from arbscale.training.sources import Batch, Source

POINTS = 1024  # of each target, where LIIF is compared with the ground truth
EXAMPLES = 32  # images on which the channels of an encoder are weighed
REMEMBERED = 1 << 30  # bytes of latents that a stage with a frozen encoder keeps


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
    return optimise(AutoencoderStage(encoder, decoder, source, preset), steps, seed, run)


def distil_encoder(
    encoder: TinyEncoder,
    teacher: TinyEncoder,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    run: Run | None = None,
) -> list[float]:
    """Train an encoder to give the same latents (B, c, h, w) as its frozen teacher, by L1.

    It starts as the part of the teacher that matters most on the images (`pruning.inherit`).
    """
    images = source(EXAMPLES, step_generator(seed, "pruning", 0)).image(preset.image_size)
    inherit(encoder, teacher, images.to(next(teacher.parameters()).device))
    return optimise(StudentStage(encoder, teacher, source, preset), steps, seed, run)


def train_decoder(
    first_stage: FirstStage,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    freeze_encoder: bool = True,
    run: Run | None = None,
    resample: Resample | None = None,
) -> list[float]:
    """Train the symmetric decoder and LIIF on the frozen encoder's latents.

    Each step draws a target size, uniform in `preset.target_sizes` as far as the images reach, and
    compares `POINTS` scattered pixels of each image by L1, and all pixels of a window, too, where
    `preset.crop` is set. LPIPS counts in full up to the encoder's input size, and less and less
    from there to four times that size, where it is left out. Patterns that repeat with each latent
    pixel of the window cost `preset.lattice_weight`. With `preset.adversarial_weight` a patch
    discriminator learns along, and its opinion of the window fades like LPIPS. With
    `freeze_encoder=False` the encoder is trained along, as in the released code's default. Latents
    that the denoiser sampled differ from encoded ones; with `resample` the decoder learns on both.
    Implements the first stage of Kim and Kim 2024.
    """
    stage = DecoderStage(first_stage, source, preset, freeze_encoder, resample)
    return optimise(stage, steps, seed, run)


def train_first_stage(
    model: ArbitraryScaleModel,
    source: Source,
    autoencoder_steps: int,
    decoder_steps: int,
    seed: int = 0,
    joint: bool = False,
    run: Run | None = None,
    resampled: float = 0.0,
) -> list[float]:
    """Pre-train the encoder, freeze it, train decoder and LIIF; return the last part's losses.

    With `joint` the second part trains the encoder, too. A part of no steps is left out. A share
    `resampled` of the second part's steps is on latents that the model's denoiser sampled.
    """
    first_stage, given, losses = model.first_stage, (source, model.preset), []
    if autoencoder_steps:
        pair = first_stage.encoder, build_decoder(model.preset).to(model.device)
        losses = train_autoencoder(*pair, *given, autoencoder_steps, seed, run)
    if decoder_steps:
        resample = Resample(model, resampled) if resampled else None
        losses = train_decoder(first_stage, *given, decoder_steps, seed, not joint, run, resample)
    return losses


class ImageStage(Stage):
    """A stage that draws images from a source, by default as the first stage does."""

    unit = "images"

    def __init__(self, source: Source, preset: Preset):
        super().__init__()
        self.source, self.preset = source, preset
        self.batch, self.lr = preset.first_stage_batch, preset.first_stage_lr

    def look(self, generator: torch.Generator, part: slice) -> Batch:
        """Draw a batch and return a part; a source that knows no parts is asked for all."""
        whole = part == slice(0, self.batch)
        return self.source(self.batch, generator, *(() if whole else (part,)))

    def facts(self) -> dict[str, Any]:
        """Return what the images are, where the source can tell."""
        return getattr(self.source, "contents", {})

    def low(self, image: Tensor) -> dict[str, Tensor]:
        """Return the low-resolution images (B, 3, l, l) that are the condition, if any."""
        side = self.preset.low_size
        return {"low": resize(image, side)} if side else {}

    def noise(self, generator: torch.Generator, part: slice) -> Tensor:
        """Draw noise (b, c, h, w) of a latent's shape."""
        side = self.preset.latent_size
        shape = (self.batch, self.preset.latent_channels, side, side)
        return torch.randn(shape, generator=generator)[part]

    def posterior_noise(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Draw what the posterior is sampled with, if there is one."""
        return {"noise": self.noise(generator, part)} if self.preset.posterior else {}

    def sizes(self) -> tuple[int, int, int]:
        """Return sizes of samples: below, at and above the encoder's input."""
        return self.preset.image_size // 2, self.preset.image_size, 2 * self.preset.image_size

    def examples(self, n: int) -> Tensor:
        """Return n images (n, 3, s, s) of the encoder's input size, the same ones each time."""
        return self.source(n, torch.Generator().manual_seed(0)).image(self.preset.image_size)


class FrozenEncoderStage(ImageStage):
    """A stage that needs the latents of images under an encoder that does not change.

    Where the source has a number for each of its images, an image is encoded once.
    """

    def __init__(self, source: Source, preset: Preset):
        super().__init__(source, preset)
        self.distinct: int | None = getattr(source, "distinct", None)
        self.remembered: dict[int, Tensor] = {}

    def look_again(
        self, generator: torch.Generator, part: slice
    ) -> tuple[Batch, dict[str, Tensor]]:
        """Draw a batch and return a part, with the images' numbers (b,) if they have any."""
        if not self.distinct:
            return self.look(generator, part), {}
        numbers = torch.randint(self.distinct, (self.batch,), generator=generator)[part]
        return self.source.pick(numbers.tolist()), {"numbers": numbers}

    @torch.compiler.disable
    @torch.no_grad()
    def latents(self, encoder: nn.Module, image: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the latents (b, c, h, w), those of numbered images from memory."""
        if numbers is None:
            return encoder(image)
        found = []
        for n, x in zip(numbers.tolist(), image, strict=True):
            # One by one, so that a latent does not depend on which images it came with.
            z = self.remembered.get(n)
            z = encoder(x[None])[0] if z is None else z
            if len(self.remembered) * z.nbytes < REMEMBERED:
                self.remembered[n] = z
            found.append(z)
        return torch.stack(found)


class AutoencoderStage(ImageStage):
    """Encoder and up-sampling decoder learn to reconstruct the image."""

    name = "autoencoder"

    def __init__(self, encoder: nn.Module, decoder: nn.Module, source: Source, preset: Preset):
        super().__init__(source, preset)
        self.encoder, self.decoder = encoder.requires_grad_(True), decoder.requires_grad_(True)

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return images, and the posterior's noise."""
        image = self.look(generator, part).image(self.preset.image_size)
        return {"image": image, **self.posterior_noise(generator, part)}

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the L1 error, with LPIPS and the divergence where they are wanted."""
        z, divergence = _sample_latent(self.encoder(image), noise)
        rgb = self.decoder(z)
        loss = F.l1_loss(rgb, image) + self.preset.kl_weight * divergence
        return loss + perceptual(self.preset, rgb, image)

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return four images, each beside its reconstruction."""
        image = self.examples(4)
        moments = self.encoder(image.to(next(self.parameters()).device))
        rgb = self.decoder(moments[:, : self.preset.latent_channels]).clamp(-1, 1).float().cpu()
        pairs = zip(image, rgb, strict=True)
        return [item for a, b in pairs for item in ((a, "original"), (b, "decoded"))]


class StudentStage(FrozenEncoderStage):
    """An encoder learns the latents of another one."""

    name = "student"

    def __init__(self, encoder: TinyEncoder, teacher: TinyEncoder, source: Source, preset: Preset):
        super().__init__(source, preset)
        self.encoder, self.teacher = encoder.requires_grad_(True), teacher.requires_grad_(False)

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return images, and their numbers."""
        batch, numbers = self.look_again(generator, part)
        return {"image": batch.image(self.preset.image_size), **numbers}

    def forward(self, image: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Return the L1 error of the latents."""
        return F.l1_loss(self.encoder(image), self.latents(self.teacher, image, numbers))


class DecoderStage(FrozenEncoderStage):
    """The symmetric decoder and LIIF learn to render any pixel from a latent."""

    name = "decoder"

    def __init__(
        self,
        first_stage: FirstStage,
        source: Source,
        preset: Preset,
        freeze_encoder: bool,
        resample: Resample | None = None,
    ):
        super().__init__(source, preset)
        self.resample = resample
        self.first_stage, self.joint = first_stage.requires_grad_(True), not freeze_encoder
        first_stage.encoder.requires_grad_(self.joint)
        device = next(first_stage.parameters()).device
        self.discriminator = PatchDiscriminator().to(device) if preset.adversarial_weight else None

    def facts(self) -> dict[str, Any]:
        """Return the images, and whether the encoder learns."""
        odds = self.resample.odds if self.resample else 0.0
        return {**super().facts(), "joint": self.joint, "resampled": odds}

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return images, and points of them at a size that is drawn, with their colours."""
        preset = self.preset
        batch, numbers = self.look_again(generator, part)
        low, high = preset.target_sizes
        high = max(low, min(high, batch.largest or high))
        size = int(torch.randint(low, high + 1, (), generator=generator))
        sides = (0, preset.crop) if preset.crop else (0,)
        points = [_points(size, side, self.batch, generator)[part] for side in sides]
        coords = torch.cat(points, dim=1)  # (b, N, 2)
        return {
            "image": batch.image(preset.image_size),
            "coords": coords,
            "cells": cell((size, size)).expand(len(coords), 2),
            "colors": batch.colors(size, coords),
            **numbers,
            **(self.posterior_noise(generator, part) if self.joint else {}),
            **self.restart(batch, generator, part),
        }

    def restart(self, batch: Batch, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Draw what latents are sampled anew from, in the steps where they are."""
        first = self.resample and self.resample.first(generator)
        if first is None:
            return {}
        low = self.low(batch.image(self.preset.image_size))
        return {**low, "start": self.noise(generator, part), "first": torch.tensor(first)}

    def forward(
        self,
        image: Tensor,
        coords: Tensor,
        cells: Tensor,
        colors: Tensor,
        noise: Tensor | None = None,
        numbers: Tensor | None = None,
        start: Tensor | None = None,
        first: Tensor | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """Return the L1 error, with LPIPS of the windows and the divergence where wanted."""
        if self.joint:
            z, divergence = _sample_latent(self.first_stage.encoder(image), noise)
        else:
            z, divergence = self.latents(self.first_stage.encode, image, numbers), 0.0
        if start is not None:
            z = self.resample(z, start, int(first), low)
        rgb = self.first_stage.liif.query(self.first_stage.features(z), coords, cells)  # (B, N, 3)
        loss = F.l1_loss(rgb, colors) + self.preset.kl_weight * divergence
        side = math.isqrt(rgb.shape[1] - POINTS)
        if not side:
            return loss
        places = coords[:, POINTS:].unflatten(1, (side, side))  # (B, side, side, 2)
        windows = [x[:, POINTS:].mT.unflatten(-1, (side, side)) for x in (rgb, colors)]
        if self.preset.lattice_weight:
            loss = loss + self.preset.lattice_weight * lattice(*windows, places, z.shape[-1])
        realism = perceptual(self.preset, *windows)
        ratio = 2 / cells[0, 0] / self.preset.image_size  # the target's side over the input's
        if self.discriminator:
            deceived, judged = self.discriminator.losses(*windows, ratio.log2())
            realism, loss = realism + self.preset.adversarial_weight * deceived, loss + judged
        # What is finer than the encoder's input no latent holds: there both would invent.
        return loss + (2 / ratio).clamp(max=1) ** 4 * realism

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return two images, each decoded at three sizes."""
        image = self.examples(2)
        z = self.first_stage.encode(image.to(next(self.parameters()).device))
        features = self.first_stage.features(z)
        shown = {"original": image}
        for size in self.sizes():
            rgb = self.first_stage.render(features, size)
            shown[f"{size} px"] = rgb.clamp(-1, 1).float().cpu()
        return [(image, label) for label, images in shown.items() for image in images]


def _sample_latent(out: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Turn the encoder's output into a latent and its mean divergence; without noise it is one."""
    if noise is None:
        return out, 0.0
    posterior = GaussianPosterior.from_moments(out)
    return posterior.mean + (0.5 * posterior.logvar).exp() * noise, posterior.kl().mean()


def _points(size: int, crop: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw pixel centres (n, N, 2) of a square image: scattered, or those of a window each."""
    centres = grid((size, size))  # (size, size, 2)
    if not crop:
        picks = torch.randint(size * size, (n, POINTS), generator=generator)
        return centres.view(-1, 2)[picks]
    side = min(crop, size)
    corners = torch.randint(size - side + 1, (n, 2), generator=generator).tolist()
    windows = [centres[y : y + side, x : x + side] for y, x in corners]
    return torch.stack(windows).flatten(1, 2)
