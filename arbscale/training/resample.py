"""Latents as sampling leaves them, for a decoder that has to render these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import UPSCALING, Sampling

NOISIEST = 0.25  # of the schedule: generation starts below, as more noise makes another image
GENERATION = Sampling(3, "dpm_solver_pp")  # from there few steps are enough


@dataclass(frozen=True)
class Resample:
    """Puts noise on latents and samples them anew, so that they err as the denoiser does.

    Super-resolution starts half-way, from the encoded input, as `upscale` does; generation starts
    from the image's own latent, at a step that is drawn.
    """

    model: ArbitraryScaleModel
    odds: float  # of a training step on such latents

    @property
    def sampling(self) -> Sampling:
        """What samples: `upscale`'s own way, or few steps of generation."""
        return UPSCALING if self.model.preset.low_size else GENERATION

    def first(self, generator: torch.Generator) -> int | None:
        """Draw the step of the schedule to start from; None leaves the latents as encoded."""
        total, least = self.model.schedule.steps, self.sampling.steps - 1
        chance, place = torch.rand(2, generator=generator).tolist()
        if chance >= self.odds:
            return None
        half = total // 2 - 1
        return max(least, half if self.model.preset.low_size else int(place * NOISIEST * total))

    @torch.no_grad()
    def __call__(self, z: Tensor, noise: Tensor, first: int, low: Tensor | None = None) -> Tensor:
        """Return unscaled latents (B, c, h, w) for those of images, or of low-resolution ones."""
        model, guess, condition = self.model, z * self.model.scale_factor, None
        if low is not None:
            guess = condition = model.condition(low, z.shape[-2:])
        fast = torch.is_autocast_enabled(z.device.type)
        denoise = model.denoise(condition, torch.bfloat16 if fast else torch.float32)
        start = model.schedule.add_noise(guess, torch.tensor([first]), noise).float()
        latents = self.sampling.run(denoise, start, model.schedule, first=first)
        return latents / model.scale_factor
