"""Training in four stages: autoencoder, LIIF decoder, diffusion, alignment.

Each stage is a function that returns its losses, one a step, and trains in place. The seed decides
everything: initial weights are drawn by the caller, batches, times and noise here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange

from arbscale.autoencoder import Decoder, Encoder, GaussianPosterior
from arbscale.coords import cell, grid
from arbscale.diffusion import alignment_loss, denoising_loss
from arbscale.first_stage import FirstStage
from arbscale.images import random_crop, resize
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset, build_decoder
from arbscale.scenes import Scenes, render_scenes, sample_scenes, scene_colors

EMA_DECAY = 0.999
POOL = 8192  # pictures encoded once for the diffusion model's training
POINTS = 1024  # of each target, where LIIF is compared with the truth


class Batch(Protocol):
    """Some pictures that can be looked at in any size."""

    def image(self, size: int) -> Tensor:
        """Return the pictures at `size`, (B, 3, size, size) in [-1, 1]."""

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Return the pictures' pixels at `size`, (B, N, 3), at pixel centres (B, N, 2)."""


Source = Callable[[int, torch.Generator], Batch]
"""`source(n, generator)` draws n pictures."""


@dataclass(frozen=True)
class SceneBatch:
    """Continuous scenes: exact at every size."""

    scenes: Scenes

    def image(self, size: int) -> Tensor:
        """Render the scenes."""
        return render_scenes(self.scenes, size)

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Evaluate the scenes at the points alone."""
        return scene_colors(self.scenes, coords, cell((size, size)).expand(len(coords), 2))


@dataclass(frozen=True)
class PhotoBatch:
    """Crops of photographs (B, 3, s, s), resized with antialiasing."""

    crops: Tensor

    def image(self, size: int) -> Tensor:
        """Resize the crops by antialiased bicubic interpolation."""
        return resize(self.crops, size)

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Look the points up among the resized crops' pixels."""
        pixels = self.image(size).flatten(2).mT  # (B, size*size, 3)
        rows, cols = ((coords + 1) * (size / 2)).long().clamp(0, size - 1).unbind(-1)
        return pixels.gather(1, (rows * size + cols)[..., None].expand(-1, -1, 3))


def scene_source(count: int = 1 << 20, seed: int = 0) -> Source:
    """Draw from the first `count` scenes of a seed's training split."""

    def source(n: int, generator: torch.Generator) -> SceneBatch:
        first = int(torch.randint(count - n + 1, (), generator=generator))
        return SceneBatch(sample_scenes(n, seed, first))

    return source


def photo_source(images: Sequence[Tensor], preset: Preset) -> Source:
    """Draw random crops of photographs (3, H, W), flipped half of the time.

    The crop's side is uniform between the encoder's input and the largest target, so that the
    model sees details at several scales.
    """
    smallest, largest = preset.image_size, max(preset.image_size, preset.target_sizes[1])

    def source(n: int, generator: torch.Generator) -> PhotoBatch:
        side = int(torch.randint(smallest, largest + 1, (), generator=generator))
        picks = torch.randint(len(images), (n,), generator=generator).tolist()
        crops = torch.stack([random_crop(images[i], side, generator) for i in picks])
        flip = torch.rand(n, generator=generator) < 0.5
        return PhotoBatch(torch.where(flip[:, None, None, None], crops.flip(-1), crops))

    return source


def train_autoencoder(
    encoder: Encoder,
    decoder: Decoder,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
) -> list[float]:
    """Pre-train the encoder with an ordinary up-sampling decoder, by L1 at one size.

    Where the latent is a Gaussian posterior it is sampled, and its divergence enters by 1e-6, as
    in Rombach et al. 2022.
    """

    def loss(generator: torch.Generator) -> Tensor:
        image = source(preset.first_stage_batch, generator).image(preset.image_size)
        image = image.to(next(encoder.parameters()).device)
        z = encoder(image)
        penalty = 0.0
        if preset.posterior:
            posterior = GaussianPosterior.from_moments(z)
            z, penalty = posterior.sample(generator), 1e-6 * posterior.kl().mean()
        return F.l1_loss(decoder(z), image) + penalty

    encoder.requires_grad_(True)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    return _optimise(loss, parameters, preset.first_stage_lr, steps, seed, "autoencoder")


def train_decoder(
    first_stage: FirstStage,
    source: Source,
    preset: Preset,
    steps: int,
    seed: int = 0,
    freeze_encoder: bool = True,
) -> list[float]:
    """Train the symmetric decoder and LIIF on the frozen encoder's latents.

    Each step draws a target size, uniform in `preset.target_sizes`, and compares `POINTS` scattered
    pixels of each picture by L1. With `freeze_encoder=False` the encoder is trained along, as in
    the released code's default. Implements the first stage of Kim and Kim 2024.
    """
    first_stage.requires_grad_(True)
    first_stage.encoder.requires_grad_(not freeze_encoder)
    device = next(first_stage.parameters()).device
    low, high = preset.target_sizes

    def loss(generator: torch.Generator) -> Tensor:
        batch = source(preset.first_stage_batch, generator)
        z = first_stage.encode(batch.image(preset.image_size).to(device))
        size = int(torch.randint(low, high + 1, (), generator=generator))
        pixels = torch.randint(size * size, (len(z), POINTS), generator=generator)
        coords = grid((size, size)).view(-1, 2)[pixels]  # (B, POINTS, 2)
        cells = cell((size, size)).expand(len(z), 2)
        features = first_stage.features(z)
        rgb = first_stage.liif.query(features, coords.to(device), cells.to(device))
        return F.l1_loss(rgb, batch.colors(size, coords).to(device))

    parameters = [p for p in first_stage.parameters() if p.requires_grad]
    return _optimise(loss, parameters, preset.first_stage_lr, steps, seed, "decoder")


def train_first_stage(
    model: ArbitraryScaleModel,
    source: Source,
    autoencoder_steps: int,
    decoder_steps: int,
    seed: int = 0,
    joint: bool = False,
) -> list[float]:
    """Pre-train the encoder, freeze it, train decoder and LIIF; return the latter's losses.

    With `joint` the encoder goes on learning in the second part. Either part may have no steps.
    """
    preset = model.preset
    if autoencoder_steps:
        helper = build_decoder(preset).to(model.device)
        encoder = model.first_stage.encoder
        train_autoencoder(encoder, helper, source, preset, autoencoder_steps, seed)
    return train_decoder(model.first_stage, source, preset, decoder_steps, seed, not joint)


def train_diffusion(
    model: ArbitraryScaleModel,
    source: Source,
    steps: int,
    seed: int = 0,
    pool: int | None = None,
) -> list[float]:
    """Train the denoiser on latents of the frozen first stage, by the denoising loss, with EMA.

    `pool` pictures (`POOL` by default) are encoded once and drawn from. Sets `model.scale_factor`;
    the averaged weights end up in the model.
    """
    model.first_stage.requires_grad_(False)
    z_pool, condition_pool = _encode_pool(model, source, pool or POOL, seed)

    def loss(generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(z_pool), (model.preset.diffusion_batch,), generator=generator)
        z0 = z_pool[picks].to(model.device)  # (B, c, h, w), scaled
        condition = None
        if condition_pool is not None:
            condition = condition_pool[picks].to(model.device)
        t, noise = _draw_times(model, z0, generator)
        return denoising_loss(model.denoise(condition), z0, t, noise, model.schedule).mean()

    lr = model.preset.diffusion_lr
    return _optimise_with_ema(model.denoiser, loss, lr, steps, seed, "diffusion")


def finetune_alignment(
    model: ArbitraryScaleModel,
    source: Source,
    steps: int,
    seed: int = 0,
    max_weight: float | None = None,
) -> list[float]:
    """Fine-tune the denoiser through the frozen decoder, by the alignment loss, with EMA.

    `max_weight` clamps the image term's weight; None as in the paper. Implements the second stage
    of the diffusion model's training of Kim and Kim 2024.
    """
    model.first_stage.requires_grad_(False)
    preset = model.preset

    def decode(z: Tensor) -> Tensor:
        return model.first_stage.decode(z / model.scale_factor, preset.image_size)

    def loss(generator: torch.Generator) -> Tensor:
        batch = source(preset.first_stage_batch, generator)
        image, z0, condition = _encode(model, batch)
        t, noise = _draw_times(model, z0, generator)
        latent_term, image_term = alignment_loss(
            model.denoise(condition), decode, z0, image, t, noise, model.schedule, max_weight
        )
        return (latent_term + image_term).mean()

    return _optimise_with_ema(model.denoiser, loss, preset.alignment_lr, steps, seed, "alignment")


@torch.no_grad()
def _encode(model: ArbitraryScaleModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return images, scaled latents and, for super-resolution, scaled conditions."""
    preset = model.preset
    image = batch.image(preset.image_size)
    z0 = model.first_stage.encode(image.to(model.device)) * model.scale_factor
    if not preset.low_size:
        return image.to(model.device), z0, None
    low = resize(image, preset.low_size).to(model.device)
    return image.to(model.device), z0, model.condition(low)


def _encode_pool(
    model: ArbitraryScaleModel, source: Source, count: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Encode `count` pictures and set the model's scale factor from them."""
    generator = torch.Generator().manual_seed(seed + 1)
    model.scale_factor = 1.0
    size = min(64, count)
    parts = []
    for _ in trange(-(-count // size), desc="encoding", unit="batch"):
        parts.append(_encode(model, source(size, generator))[1:])
    z = torch.cat([z.cpu() for z, _ in parts])
    model.scale_factor = 1 / z.std().item()
    condition = None
    if model.preset.low_size:
        condition = torch.cat([c.cpu() for _, c in parts]) * model.scale_factor
    return z * model.scale_factor, condition


def _draw_times(
    model: ArbitraryScaleModel, z0: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw steps (B,) uniformly, and noise like z0."""
    t = torch.randint(model.schedule.steps, (len(z0),), generator=generator)
    noise = torch.randn(z0.shape, generator=generator)
    return t.to(z0.device), noise.to(z0)


def _optimise(
    loss: Callable[[torch.Generator], Tensor],
    parameters: Iterable[nn.Parameter],
    lr: float,
    steps: int,
    seed: int,
    name: str,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Run Adam with a short warm-up and a cosine decay; RuntimeError at a non-finite loss."""
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warm_up)),
        ],
        milestones=[warm_up],
    )
    losses = []
    bar = trange(steps, desc=name, unit="step", mininterval=1)
    for step in bar:
        value = loss(generator)
        losses.append(value.item())
        if not torch.isfinite(value):
            raise RuntimeError(
                f"{name}: the loss became {value.item()} at step {step}; take a lower learning rate"
            )
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if after_step:
            after_step(step)
        recent = losses[-50:]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
    return losses


def _optimise_with_ema(
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    lr: float,
    steps: int,
    seed: int,
    name: str,
) -> list[float]:
    """Train, keep an exponential moving average of the weights, and leave it in the network."""
    average = copy.deepcopy(network)

    def update(step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(p, 1 - decay)

    losses = _optimise(loss, network.parameters(), lr, steps, seed, name, update)
    network.load_state_dict(average.state_dict())
    return losses
