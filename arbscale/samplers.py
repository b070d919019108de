"""Samplers: from noise to a latent, by calling the denoiser once per step.

Each sampler is one plain function. It knows no image and no network, and all share one form,

    sampler(denoise, z, schedule, timesteps, *, final_alpha_bar, generator, callback) -> z_0

===================  ============================================================================
denoise              `denoise(z_t, t) -> eps`: latents (B, c, h, w), steps (B,), the noise in them
z                    standard normal noise (B, c, h, w): the latents at the first of `timesteps`
schedule             gives alpha_bar
timesteps            a number of evenly spaced steps, or the steps themselves
final_alpha_bar      what the last step leads to; 1 is no noise at all
generator            a generator on the CPU; None takes torch's global one
callback             `callback(i, z_t, z_0)` after each step
noise                `noise(t)` (B, c, h, w) is what a step that leaves t adds, where it adds noise;
                     by default drawn from the generator
===================  ============================================================================

All return latents (B, c, h, w) in `z`'s dtype on its device; coefficients come from float64. Noise
is drawn on the CPU in float32 and moved, so that a seed gives the same latent on every device.
ValueError says which parameter is out of range.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from arbscale.coords import Size
from arbscale.diffusion import Denoiser, NoiseSchedule
from arbscale.store import InputError

Callback = Callable[[int, Tensor, Tensor], None]
"""`callback(i, z_t, z_0)` after step i = 0, 1, ...: the latents it led to, its estimate of z_0."""

NOISE_BLOCK = 32  # latent pixels per side that share one stream of random numbers

Timesteps = int | Sequence[int]
"""A number of steps, or the steps themselves, strictly decreasing."""


def spaced_timesteps(total: int, n: int, power: float = 1.0) -> list[int]:
    """Return `n` of the steps 0 to `total - 1`, decreasing, the first and the last always there.

    The largest step is where pure noise belongs; a network told otherwise leaves a grey veil (Lin
    et al. 2024). `power = 1` spaces evenly. `power = 2` is the quadratic grid of Song et al. 2021,
    appendix D.2: denser at low noise, where a solver with few steps makes most of its error.
    """
    if not 1 <= n <= total:
        raise InputError(f"the number of steps is between 1 and the schedule's {total}, got {n}")
    if not 1 <= power < math.inf:
        raise InputError(f"power is at least 1 (even) and finite, got {power}")
    steps = [0] if n > 1 else [total - 1]
    for k in range(1, n):
        steps.append(max(steps[-1] + 1, round((total - 1) * (k / (n - 1)) ** power)))
    return steps[::-1]


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps | None = None,
    *,
    final_alpha_bar: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling: draw each step from the posterior q(z_s | z_t, z_0) at the estimated z_0.

    Implements Algorithm 2 of Ho et al. 2020 with the posterior's variance (eq. 7, the smaller of
    the two they try), without clipping. On a subset of the steps it is ancestral over that subset.
    """
    steps, alpha_bars = _grid(
        schedule, schedule.steps if timesteps is None else timesteps, final_alpha_bar
    )
    draw = noise or _drawing(z, generator)
    for i, t in enumerate(steps):
        now, to = alpha_bars[i], alpha_bars[i + 1]
        beta = 1 - now / to  # of the whole stride
        z_0 = _estimate(z, _eps(denoise, z, t), now)  # (B, c, h, w)
        from_z_0 = to**0.5 * beta / (1 - now)
        from_z_t = (1 - beta) ** 0.5 * (1 - to) / (1 - now)
        z = from_z_0 * z_0 + from_z_t * z
        variance = (1 - to) / (1 - now) * beta
        if variance > 0:
            z = z + variance**0.5 * draw(t).to(z)
        if callback:
            callback(i, z, z_0)
    return z


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps = 200,
    *,
    eta: float = 0.0,
    final_alpha_bar: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Implicit sampling: estimate z_0, then put back less of the same noise.

    Implements eq. 12 and 16 of Song, Meng and Ermon 2021 (DDIM), without clipping. With `eta = 0`
    it is deterministic, a first-order solver of the diffusion's ODE; with `eta = 1` it is `ddpm`.

    `eta` is the share of fresh noise, in [0, 1]. CompVis' code ends at `alpha_bar[0]`, not at 1.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is between 0 (deterministic) and 1 (ancestral), got {eta}")
    steps, alpha_bars = _grid(schedule, timesteps, final_alpha_bar)
    draw = noise or _drawing(z, generator)
    for i, t in enumerate(steps):
        now, to = alpha_bars[i], alpha_bars[i + 1]
        eps = _eps(denoise, z, t)  # (B, c, h, w)
        z_0 = _estimate(z, eps, now)  # (B, c, h, w)
        sigma = eta * ((1 - to) / (1 - now) * (1 - now / to)) ** 0.5
        z = to**0.5 * z_0 + (1 - to - sigma**2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * draw(t).to(z)
        if callback:
            callback(i, z, z_0)
    return z


@torch.no_grad()
def dpm_solver_pp(
    denoise: Denoiser,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps = 20,
    *,
    final_alpha_bar: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Second-order multistep solver of the diffusion's ODE: good latents in about 20 steps.

    Implements Algorithm 2 of Lu et al. 2022b, DPM-Solver++(2M): `ddim` in the variable
    lambda = log(alpha / sigma), with z_0 extrapolated to the middle of the step from this step's
    and the last step's estimate. First order where that is impossible or unstable: the first step,
    a last step to no noise (lambda is infinite there), and the last of fewer than 15 steps.

    It is deterministic: `generator` and `noise` are unused.
    """
    return _multistep(denoise, z, schedule, timesteps, final_alpha_bar, None, callback)


@torch.no_grad()
def sde_dpm_solver_pp(
    denoise: Denoiser,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps = 25,
    *,
    final_alpha_bar: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Second-order multistep solver of the diffusion's SDE: fresh noise hides earlier errors.

    Implements SDE-DPM-Solver++(2M) of Lu et al. 2022b, appendix: `dpm_solver_pp` that removes twice
    as much noise in each step and puts half of it back anew. A denoiser's errors add up along the
    ODE, and are replaced by noise along the SDE.
    """
    draw = noise or _drawing(z, generator)
    return _multistep(denoise, z, schedule, timesteps, final_alpha_bar, draw, callback)


def _multistep(
    denoise: Denoiser,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    final_alpha_bar: float,
    draw: Callable[[int], Tensor] | None,
    callback: Callback | None,
) -> Tensor:
    """Solve the ODE, or the SDE where noise is drawn, in steps of lambda."""
    steps, alpha_bars = _grid(schedule, timesteps, final_alpha_bar)
    lambdas = [math.inf if a == 1 else 0.5 * math.log(a / (1 - a)) for a in alpha_bars]
    z_0_before = None
    for i, t in enumerate(steps):
        now, to = alpha_bars[i], alpha_bars[i + 1]
        step = lambdas[i + 1] - lambdas[i]
        z_0 = _estimate(z, _eps(denoise, z, t), now)  # (B, c, h, w)
        first_order = i == 0 or to == 1 or (i == len(steps) - 1 and len(steps) < 15)
        if first_order:
            middle = z_0
        else:
            step_before = lambdas[i] - lambdas[i - 1]
            middle = z_0 + step / (2 * step_before) * (z_0 - z_0_before)  # (B, c, h, w)
        way, fade = (2 * step, math.exp(-step)) if draw else (step, 1.0)
        kept = ((1 - to) / (1 - now)) ** 0.5 * fade
        z = kept * z - to**0.5 * math.expm1(-way) * middle
        if draw and to < 1:
            z = z + (-(1 - to) * math.expm1(-way)) ** 0.5 * draw(t).to(z)
        z_0_before = z_0
        if callback:
            callback(i, z, z_0)
    return z


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp": dpm_solver_pp,
    "sde_dpm_solver_pp": sde_dpm_solver_pp,
}
"""The samplers by name."""

POWERS = {"dpm_solver_pp": 2.0, "sde_dpm_solver_pp": 2.0}
"""`power` of the grid of steps that suits a sampler, where it is not even (1)."""


def get_sampler(name: str) -> Callable[..., Tensor]:
    """Return the sampler of that name; ValueError lists the names there are."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; take one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn."""

    steps: int = 20  # denoising steps
    sampler: str = "dpm_solver_pp"  # or ddpm, ddim, sde_dpm_solver_pp
    seed: int = 0  # decides everything
    guidance: float | None = None  # weight against the guide; 1: no guide, None: the model's

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that no sampler takes."""
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"guidance is a finite number, 1 for no guide, got {self.guidance}")
        for name in ("seed", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise InputError(f"{name} is an integer, got {value!r}")
            object.__setattr__(self, name, index(value))  # NumPy's are no JSON
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"a seed is an integer from -2**63 to 2**64 - 1, got {self.seed!r}")

    def generator(self) -> torch.Generator:
        """Return a fresh generator on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    def run(
        self,
        denoise: Denoiser,
        z: Tensor,
        schedule: NoiseSchedule,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        first: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Run the sampler on the grid of steps that suits it; ValueError for unknown names.

        `first` is the step whose noise `z` has, by default the schedule's last.
        """
        sampler = get_sampler(self.sampler)
        total = schedule.steps if first is None else first + 1
        timesteps = spaced_timesteps(total, self.steps, POWERS.get(self.sampler, 1.0))
        drawn = {"generator": generator, "noise": noise}
        return sampler(denoise, z, schedule, timesteps, callback=callback, **drawn)


UPSCALING = Sampling(2, "dpm_solver_pp")
"""How `upscale` samples by default; the decoder of `photos` has learned on what it gives.

The input decides most of the image, so two steps are enough.
"""


def streams(start: Tensor) -> Callable[[int], Tensor]:
    """Return `noise(t)` (B, c, h, w) for latents that start from noise (B, c, h, w).

    Each image draws from a stream of its own, which its start noise decides, so that it does not
    depend on the images that are drawn with it.
    """
    digests = [hashlib.sha256(x.contiguous().numpy().tobytes()).digest() for x in start.cpu()]
    seeds = [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda t: torch.stack([torch.randn(start.shape[1:], generator=g) for g in generators])


def noise_field(seed: int, channels: int, corner: Size, size: Size) -> Tensor:
    """Cut a window (channels, h, w) from an endless field of normal noise that `seed` names.

    Each block of the field has its own stream, so a window costs no more wherever it lies.
    """
    rows, cols = (
        range(start // NOISE_BLOCK, (start + n - 1) // NOISE_BLOCK + 1)
        for start, n in zip(corner, size, strict=True)
    )

    def block(row: int, col: int) -> Tensor:
        mixed = (seed * 1_000_003 + row) * 1_000_003 + col  # any mixing: the generator scrambles
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return torch.randn(channels, NOISE_BLOCK, NOISE_BLOCK, generator=generator)

    field = torch.cat([torch.cat([block(row, col) for col in cols], 2) for row in rows], 1)
    top, left = corner[0] - rows[0] * NOISE_BLOCK, corner[1] - cols[0] * NOISE_BLOCK
    return field[:, top : top + size[0], left : left + size[1]]


def _eps(denoise: Denoiser, z: Tensor, t: int) -> Tensor:
    """Ask the denoiser with the same step `t` for the whole batch."""
    return denoise(z, torch.full((len(z),), t, dtype=torch.int64, device=z.device)).to(z)


def _estimate(z: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """Return the one-step estimate of the clean latents."""
    return (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def _drawing(z: Tensor, generator: torch.Generator | None) -> Callable[[int], Tensor]:
    """Return a `noise(t)` that draws float32 noise like `z` on the CPU."""
    if generator is not None and generator.device.type != "cpu":
        raise InputError(f"noise is drawn on the CPU; got a generator on {generator.device}")
    return lambda t: torch.randn(z.shape, generator=generator, dtype=torch.float32)


def _grid(
    schedule: NoiseSchedule, timesteps: Timesteps, final_alpha_bar: float
) -> tuple[list[int], list[float]]:
    """Return the checked steps and alpha_bar at each of them, then after the last."""
    steps = _check_timesteps(timesteps, schedule.steps)
    alpha_bars = schedule.alpha_bar[steps].tolist()
    final = float(final_alpha_bar)
    if not alpha_bars[-1] <= final <= 1:
        raise InputError(f"final_alpha_bar is from {alpha_bars[-1]:.6f} to 1, got {final}")
    return steps, [*alpha_bars, final]


def _check_timesteps(timesteps: Timesteps, total: int) -> list[int]:
    """Return the steps as a list of integers; ValueError unless they decrease within the range."""
    try:
        steps = [index(t) for t in timesteps]
    except TypeError:  # not a sequence of integers
        try:
            return spaced_timesteps(total, index(timesteps))
        except TypeError:
            steps = []
    inside = all(0 <= t < total for t in steps)
    if not steps or not inside or any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
        wanted = f"a number of steps or strictly decreasing integers in [0, {total})"
        raise InputError(f"timesteps is {wanted}, got {timesteps!r}")
    return steps
