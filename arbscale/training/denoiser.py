"""Training the denoiser: diffusion on latents, then alignment through the frozen decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from arbscale import store
from arbscale.diffusion import alignment_loss, denoising_loss
from arbscale.model import ArbitraryScaleModel
from arbscale.store import InputError
from arbscale.training import latents
from arbscale.training.draws import step_generator
from arbscale.training.first_stage import ImageStage
from arbscale.training.loop import Run, optimise
from arbscale.training.sources import Source

POOL = 8192  # images encoded once for the diffusion model's training


def train_diffusion(
    model: ArbitraryScaleModel,
    source: Source,
    steps: int,
    seed: int = 0,
    pool: int | None = None,
    run: Run | None = None,
) -> list[float]:
    """Train the denoiser on latents of the frozen first stage, by the denoising loss, with EMA.

    `pool` images are encoded once and drawn from; by default all of the source with their mirror
    images, or `POOL` where its crops vary. A run with a folder keeps the latents there. Sets
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


class _DenoiserStage(ImageStage):
    """What the two stages share that train the denoiser beside a frozen first stage."""

    def __init__(self, model: ArbitraryScaleModel, source: Source):
        super().__init__(source, model.preset)
        self.model = model
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

    def times(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Draw steps (b,) uniformly, and noise (b, c, h, w)."""
        t = torch.randint(self.model.schedule.steps, (self.batch,), generator=generator)
        return {"t": t[part], "noise": self.noise(generator, part)}

    def encode(self, image: Tensor, low: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return unscaled latents and, for super-resolution, unscaled conditions."""
        model = self.model
        z = model.first_stage.encode(image.to(model.device))
        if low is None:
            return (z,)
        return z, model.condition(low.to(model.device)) / model.scale_factor

    @torch.no_grad()
    def preview(self) -> list[tuple[Tensor, str]]:
        """Return images from the same noise, or low-resolution ones, at each size."""
        sizes, model = self.sizes(), self.model
        if not self.preset.low_size:
            drawn = {size: model.generate(2, size, seed=0, steps=10) for size in sizes}
        else:
            low = self.low(self.examples(2))["low"]
            drawn = {n: model.upscale(low, size=n, steps=10) for n in sizes}
            drawn = {low.shape[-1]: low} | drawn
        return [(x, f"{size} px") for size, batch in drawn.items() for x in batch.float().cpu()]


class DiffusionStage(_DenoiserStage):
    """The denoiser learns to predict the noise in latents that were encoded beforehand."""

    name, unit = "diffusion", "latents"

    def __init__(self, model: ArbitraryScaleModel, source: Source, pool: int | None):
        super().__init__(model, source)
        self.distinct = getattr(source, "distinct", None) if pool is None else None
        self.pool = (self.distinct or POOL) if pool is None else pool
        if self.pool < 2:
            raise InputError(f"a pool has at least 2 images, got {self.pool}")
        self.batch, self.lr = self.preset.diffusion_batch, self.preset.diffusion_lr

    def facts(self) -> dict[str, Any]:
        """Return the images, and how many are encoded."""
        return {**super().facts(), "pool": self.pool}

    def prepare(self, run: Run, accelerator: Any, seed: int) -> None:
        """Encode the pool, or open it where it has been encoded before; take its deviation."""
        folder = run.latents or (run.folder and Path(run.folder) / "latents")
        identity = getattr(self.source, "identity", None)
        with accelerator.main_process_first():
            if folder and identity:
                sides = self.preset.image_size, self.preset.low_size
                facts = identity, self.pool, seed, sides, self.distinct
                key = store.content_key(*facts, module=self.model.first_stage.encoder)
                self.latents = latents.cached(folder, key, self.pool, lambda: self._parts(seed))
            else:
                self.latents = latents.in_memory(lambda: self._parts(seed))
        self.scale_factor.fill_(1 / self.latents.std())
        super().prepare(run, accelerator, seed)

    @torch.no_grad()
    def _parts(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Encode the pool, 64 images at a time: unscaled latents and conditions."""
        for start in trange(0, self.pool, 64, desc="encoding", unit="batch"):
            numbers = range(start, min(start + 64, self.pool))
            if self.distinct:
                batch = self.source.pick(numbers)
            else:
                batch = self.source(len(numbers), step_generator(seed, "pool", start))
            image = batch.image(self.preset.image_size)
            yield tuple(z.cpu() for z in self.encode(image, **self.low(image)))

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return latents of the pool, scaled, with conditions, steps and noise."""
        picks = torch.randint(len(self.latents), (self.batch,), generator=generator)
        scaled = (z * self.model.scale_factor for z in self.latents[picks[part]])
        named = dict(zip(("z0", "condition"), scaled, strict=False))
        return {**named, **self.times(generator, part)}

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

    name = "alignment"

    def __init__(self, model: ArbitraryScaleModel, source: Source, max_weight: float | None):
        super().__init__(model, source)
        self.max_weight, self.lr = max_weight, self.preset.alignment_lr

    def facts(self) -> dict[str, Any]:
        """Return the images, and the clamp."""
        return {**super().facts(), "max_weight": self.max_weight}

    def draw(self, generator: torch.Generator, part: slice) -> dict[str, Tensor]:
        """Return images, low-resolution ones where there are conditions, steps and noise."""
        image = self.look(generator, part).image(self.preset.image_size)
        return {"image": image, **self.low(image), **self.times(generator, part)}

    def forward(self, image: Tensor, t: Tensor, noise: Tensor, low: Tensor | None = None) -> Tensor:
        """Return the sum of the latent and the image term."""
        model, size = self.model, self.preset.image_size
        with torch.no_grad():
            z0, *rest = (z * model.scale_factor for z in self.encode(image, low))

        def decode(z: Tensor) -> Tensor:
            return model.first_stage.decode(z / model.scale_factor, size)

        given = (z0, image, t, noise, model.schedule, self.max_weight)
        return sum(alignment_loss(model.denoise(*rest), decode, *given)).mean()
