"""The noise schedule, what a denoiser's output means, and the diffusion's two training losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from arbscale.store import InputError
from arbscale.unet import computing

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`denoise(z_t, t) -> eps`: latents and noise (B, c, h, w), steps (B,) int64."""


class NoiseSchedule:
    """How much signal is left at each of the diffusion's steps.

    The betas are the squares of evenly spaced square roots, as in CompVis' latent diffusion.
    `alpha_bar` is float64 on the CPU and is cast for the latents it meets.

    Parameters
    ----------
    beta_start, beta_end
        First and last beta, each in (0, 1), `beta_start <= beta_end`.
    steps
        Number of steps T; a step `t` is an integer in [0, T).

    """

    def __init__(self, beta_start: float = 0.0015, beta_end: float = 0.0155, steps: int = 1000):
        if not 0 < beta_start <= beta_end < 1 or steps < 1:
            got = beta_start, beta_end, steps
            raise InputError(f"needed 0 < beta_start <= beta_end < 1 and steps >= 1, got {got}")
        self.steps = steps
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        self.betas = roots**2  # (T,)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)  # (T,)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return `alpha_bar[t]` as (B, 1, 1, 1), on the device and in the dtype of `like`.

        Of half precision it is float32: in bfloat16 the first step's 0.9985 would be 1, no noise.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        return self.alpha_bar[t.cpu()].to(like.device, dtype).view(-1, 1, 1, 1)

    def add_noise(self, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Jump from clean latents (B, c, h, w) to their noisy version at steps `t` (B,)."""
        alpha_bar = self.at(t, z0)
        return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise

    def predict_z0(self, z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Invert `add_noise` for a given noise: the one-step estimate of the clean latent."""
        alpha_bar = self.at(t, z_t)
        return (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()

    def weight(self, t: Tensor) -> Tensor:
        """Return the alignment weight `w(t) = alpha_bar / (1 - alpha_bar)`, shape (B,), float64."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return alpha_bar / (1 - alpha_bar)


def noise_of(
    network: nn.Module,
    schedule: NoiseSchedule,
    prediction: str,
    condition: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """Return `denoise(z_t, t)`, which gives the noise, with the network's condition filled in.

    The network computes in `dtype`, float32 or bfloat16, between float32 latents and noise. One
    whose `prediction` is "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans and Ho 2022)
    is read as eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t; else it gives "eps" itself.
    """

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        with computing(z.device, dtype):
            out = network(z, t, condition).to(z)  # (B, c, h, w)
        if prediction == "eps":
            return out
        alpha_bar = schedule.at(t, z)
        return alpha_bar.sqrt() * out + (1 - alpha_bar).sqrt() * z

    return denoise


def guided(denoise: Denoiser, guide: Denoiser, weight: float) -> Denoiser:
    """Return a denoiser that goes beyond `denoise`, away from a weaker `guide`.

    Where the two disagree, the weaker one errs more, so the answer goes from the weaker one through
    the stronger one and beyond. Implements autoguidance, Karras et al. 2024: guide + weight
    (denoise - guide). A `weight` of 1 is `denoise` alone, 0 the guide alone.
    """
    return lambda z, t: torch.lerp(guide(z, t), denoise(z, t), weight)


def denoising_loss(
    denoise: Denoiser, z0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Mean squared error of the predicted noise, one value per image, shape (B,).

    Takes scaled latents (B, c, h, w), steps (B,) and noise like the latents.
    Implements the simple loss of Ho et al. 2020, eq. 14, on latents.
    """
    eps = denoise(schedule.add_noise(z0, t, noise), t)  # (B, c, h, w)
    return (eps - noise).square().mean(dim=(1, 2, 3))  # (B,)


def alignment_loss(
    denoise: Denoiser,
    decode: Callable[[Tensor], Tensor],
    z0: Tensor,
    image: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    max_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the latent and the image term of the alignment loss, each of shape (B,).

    The one-step estimate of the clean latent is compared with the clean latent, and its decoding
    with the image; both errors are weighted by `w(t)`. Gradients reach the denoiser through the
    frozen decoder. By algebra the latent term equals the plain noise error, so it is computed as
    such, which is exact where `w(t)` is large.

    `denoise` predicts the noise in a scaled latent; `decode` maps *scaled* latents (B, c, h, w) to
    images of `image`'s size, so it divides by the scale. `image` is (B, 3, H, W) in [-1, 1]; the
    rest is as for `denoising_loss`. `max_weight` clamps the image term's `w(t)`: None as in the
    paper, 0 for no image term.

    Source: Kim and Kim 2024, second stage of the diffusion model's training.
    """
    z_t = schedule.add_noise(z0, t, noise)
    eps = denoise(z_t, t)
    latent_term = (eps - noise).square().mean(dim=(1, 2, 3))
    if max_weight == 0:
        return latent_term, torch.zeros_like(latent_term)
    z0_hat = schedule.predict_z0(z_t, t, eps)  # (B, c, h, w)
    weight = schedule.weight(t).to(z0)  # (B,)
    if max_weight is not None:
        weight = weight.clamp(max=max_weight)
    image_term = weight * (image - decode(z0_hat)).square().mean(dim=(1, 2, 3))
    return latent_term, image_term
