"""The samplers against diffusers' schedulers and against the closed form on a Gaussian."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from arbscale.diffusion import NoiseSchedule
from arbscale.samplers import (
    SAMPLERS,
    Sampling,
    ddim,
    ddpm,
    dpm_solver_pp,
    get_sampler,
    sde_dpm_solver_pp,
    spaced_timesteps,
)

SCHEDULE = NoiseSchedule(0.0015, 0.0195, 1000)
MU, S = 0.7, 0.5  # the Gaussian data of the closed form


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(shape=(2, 3, 8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def toy(z, t):
    """Stand in for a network: smooth, nonlinear, depends on the step."""
    alpha = SCHEDULE.at(t, z).sqrt()
    phase = t.view(-1, 1, 1, 1).to(z) / 300
    return gaussian(z, t) + 0.5 * alpha * torch.sin(2 * z + phase)


def gaussian(z, t):
    """Predict the noise exactly, for data N(MU, S^2)."""
    alpha_bar = SCHEDULE.at(t, z)
    variance = alpha_bar * S**2 + 1 - alpha_bar
    return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * MU) / variance


def gaussian_flow(z, t, end_alpha_bar):
    """Follow the ODE from step t to `end_alpha_bar`: it keeps each point's quantile."""
    now, end = SCHEDULE.alpha_bar[t].item(), float(end_alpha_bar)
    spread = ((end * S**2 + 1 - end) / (now * S**2 + 1 - now)) ** 0.5
    return end**0.5 * MU + spread * (z - now**0.5 * MU)


def run_diffusers(scheduler, z, timesteps, **options):
    for t in timesteps:
        eps = toy(z, torch.full((len(z),), t))
        z = scheduler.step(eps, t, z, **options).prev_sample
    return z


def reference(name, n, **options):
    """Return one of diffusers' schedulers on our schedule, and the n steps that it visits."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(trained_betas=SCHEDULE.betas.numpy(), **options)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar  # theirs, float32, is off by more than we test
    scheduler.set_timesteps(n)
    return scheduler, scheduler.timesteps.tolist()


# --- against diffusers ---


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_agrees_with_diffusers(eta, to_one):
    options = {"clip_sample": False, "set_alpha_to_one": to_one, "timestep_spacing": "trailing"}
    scheduler, timesteps = reference("DDIMScheduler", 50, **options)
    noises = {t: start(seed=t) for t in timesteps}
    ours = ddim(
        toy,
        start(),
        SCHEDULE,
        timesteps,
        eta=eta,
        final_alpha_bar=1.0 if to_one else SCHEDULE.alpha_bar[0],
        noise=noises.__getitem__,
    )
    z = start()
    for t in timesteps:
        eps = toy(z, torch.full((len(z),), t))
        given = noises[t] if eta > 0 else None
        z = scheduler.step(eps, t, z, eta=eta, variance_noise=given).prev_sample
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 50, 8])
def test_ddpm_agrees_with_diffusers(n):
    """Diffusers draws no noise at t = 0 alone, so the steps end there."""
    options = {"variance_type": "fixed_small", "clip_sample": False, "timestep_spacing": "leading"}
    scheduler, timesteps = reference("DDPMScheduler", n, **options)
    assert timesteps[-1] == 0
    theirs = run_diffusers(scheduler, start(), timesteps, generator=seeded(3))
    drawn = seeded(3)
    ours = ddpm(
        toy,
        start(),
        SCHEDULE,
        timesteps,
        noise=lambda t: torch.randn((2, 3, 8, 8), generator=drawn, dtype=torch.float64),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 8, 14, 15, 20, 50])
def test_dpm_solver_pp_agrees_with_diffusers(n, spacing):
    scheduler, timesteps = reference(
        "DPMSolverMultistepScheduler",
        n,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing=spacing,
    )
    theirs = run_diffusers(scheduler, start(), timesteps)
    ours = dpm_solver_pp(toy, start(), SCHEDULE, timesteps)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 20])
def test_dpm_solver_pp_to_some_noise_agrees_with_diffusers(n):
    """The last step to a finite lambda is of second order, unless there are few steps."""
    options = {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}
    scheduler, timesteps = reference("DPMSolverMultistepScheduler", n, **options)
    theirs = run_diffusers(scheduler, start(), timesteps)
    final = SCHEDULE.alpha_bar[0]
    ours = dpm_solver_pp(toy, start(), SCHEDULE, timesteps, final_alpha_bar=final)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 8, 15, 20])
def test_sde_dpm_solver_pp_agrees_with_diffusers(n):
    scheduler, timesteps = reference(
        "DPMSolverMultistepScheduler",
        n,
        algorithm_type="sde-dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    theirs = run_diffusers(scheduler, start(), timesteps, generator=seeded(3))
    ours = sde_dpm_solver_pp(toy, start(), SCHEDULE, timesteps, generator=seeded(3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- against the closed form ---


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp, 2)])
def test_error_falls_with_the_solvers_order(sampler, order):
    """From step 999 to step 39, in strides that halve."""
    z, end = start(), SCHEDULE.alpha_bar[39]
    exact = gaussian_flow(z, 999, end)
    errors = []
    for stride in (16, 8, 4):
        out = sampler(gaussian, z, SCHEDULE, range(999, 39, -stride), final_alpha_bar=end)
        errors.append((out - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order, errors
    assert errors[-1] < (1e-2 if order == 1 else 1e-3)


def test_deterministic_samplers_reach_the_clean_gaussian():
    z = start()
    exact = gaussian_flow(z, 999, 1)

    def error(sampler, timesteps):
        return (sampler(gaussian, z, SCHEDULE, timesteps) - exact).square().mean().sqrt().item()

    assert error(ddim, 1000) < 5e-3
    assert error(ddim, 50) < 5e-2
    assert error(dpm_solver_pp, 1000) < 2e-3
    quadratic = spaced_timesteps(1000, 20, power=2)
    assert error(dpm_solver_pp, quadratic) < 1e-2
    assert error(dpm_solver_pp, quadratic) < error(ddim, quadratic) / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "options"),
    [(ddpm, {}), (ddim, {"eta": 1.0}), (ddim, {"eta": 0.5}), (sde_dpm_solver_pp, {})],
)
def test_stochastic_samplers_have_the_gaussians_moments(sampler, options):
    z = torch.randn((20, 1, 50, 50), generator=seeded(0))
    out = sampler(gaussian, z, SCHEDULE, 1000, generator=seeded(1), **options)
    assert abs(out.mean().item() - MU) < 0.01
    assert abs(out.std().item() - S) < 0.01


@pytest.mark.parametrize("timesteps", [50, [900, 500, 41, 3]])
def test_ddpm_is_ddim_with_eta_one(timesteps):
    a = ddpm(toy, start(), SCHEDULE, timesteps, generator=seeded(5))
    b = ddim(toy, start(), SCHEDULE, timesteps, eta=1.0, generator=seeded(5))
    torch.testing.assert_close(a, b)


def test_the_first_step_of_dpm_solver_pp_is_ddims():
    """Both are exact where the estimate of z_0 is constant."""
    end = SCHEDULE.alpha_bar[100]
    a = dpm_solver_pp(toy, start(), SCHEDULE, [600], final_alpha_bar=end)
    torch.testing.assert_close(a, ddim(toy, start(), SCHEDULE, [600], final_alpha_bar=end))


def test_ddim_with_given_noise_ends_at_the_given_alpha_bar():
    """The released code's grid: from 801 to 1, then alpha_bar[0], with noise in every step."""
    timesteps = [1, 201, 401, 601, 801][::-1]
    asked = []

    def noise(t):
        asked.append(t)
        return start(seed=t)

    end = SCHEDULE.alpha_bar[0]
    ddim(toy, start(), SCHEDULE, timesteps, eta=1.0, noise=noise, final_alpha_bar=end)
    assert asked == timesteps


# --- the common form ---


def test_spaced_timesteps():
    assert spaced_timesteps(1000, 4) == [999, 666, 333, 0]
    assert spaced_timesteps(10, 10) == list(range(9, -1, -1))
    assert spaced_timesteps(1000, 1) == [999]
    assert spaced_timesteps(1000, 4, power=2) == [999, 444, 111, 0]
    assert spaced_timesteps(5, 4, power=2) == [4, 2, 1, 0]  # not twice 0


@pytest.mark.parametrize("power", [1, 2, 3.5])
def test_any_number_of_steps_is_spaced(power):
    for n in range(2, 98):
        timesteps = spaced_timesteps(97, n, power)
        gaps = [a - b for a, b in itertools.pairwise(timesteps)]
        assert len(timesteps) == n and timesteps[0] == 96 and timesteps[-1] == 0
        assert min(gaps) >= 1 and (power > 1 or max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize("power", [0.5, float("inf"), float("nan")])
def test_power_is_checked(power):
    with pytest.raises(ValueError, match="power"):
        spaced_timesteps(1000, 10, power)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_be_called_by_name(name):
    def run(seed, steps=6):
        sampler = get_sampler(name)
        return sampler(toy, start(), SCHEDULE, steps, generator=seeded(seed), callback=None)

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert torch.equal(run(1), run(2)) == (name in ("ddim", "dpm_solver_pp"))
    torch.testing.assert_close(run(1), run(1, spaced_timesteps(1000, 6)))
    torch.testing.assert_close(run(1), run(1, torch.tensor(spaced_timesteps(1000, 6))))
    torch.testing.assert_close(run(1, [999]), run(1, torch.tensor([999])))  # a step, not a number


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_each_step_and_its_estimate(name):
    seen, asked = [], []

    def denoise(z, t):
        assert t.shape == (2,) and t.dtype == torch.int64 and not torch.is_grad_enabled()
        asked.append((z, t))
        return toy(z, t)

    out = SAMPLERS[name](
        denoise,
        start(),
        SCHEDULE,
        5,
        generator=seeded(0),
        callback=lambda i, z_t, z_0: seen.append((i, z_t, z_0)),
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t[0].item() for _, t in asked] == spaced_timesteps(1000, 5)
    for (z, t), (_, _, z_0) in zip(asked, seen, strict=True):
        torch.testing.assert_close(z_0, SCHEDULE.predict_z0(z, t, toy(z, t)))
    assert seen[-1][1] is out
    torch.testing.assert_close(out, seen[-1][2])  # no noise is left, so they are the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_dtype_is_the_noises_and_the_draw_is_the_same(name, dtype):
    z = start().to(dtype).requires_grad_()
    out = SAMPLERS[name](toy, z, SCHEDULE, 10, generator=seeded(0))
    assert out.dtype == dtype and not out.requires_grad
    exact = SAMPLERS[name](toy, start(), SCHEDULE, 10, generator=seeded(0))
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_generator_none_takes_the_global_one(name):
    torch.manual_seed(0)
    a = SAMPLERS[name](toy, start(), SCHEDULE, 5)
    torch.manual_seed(0)
    assert torch.equal(a, SAMPLERS[name](toy, start(), SCHEDULE, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_the_same_latents_on_the_gpu(name):
    a = SAMPLERS[name](toy, start(), SCHEDULE, 10, generator=seeded(0))
    b = SAMPLERS[name](toy, start().cuda(), SCHEDULE, 10, generator=seeded(0))
    torch.testing.assert_close(a, b.cpu())
    with pytest.raises(ValueError, match="cuda"):
        ddpm(toy, start(), SCHEDULE, 10, generator=torch.Generator("cuda"))


# --- errors ---


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [0, -3, 1001])
def test_number_of_steps_is_checked(name, n):
    with pytest.raises(ValueError, match=f"1000, got {n}"):
        SAMPLERS[name](toy, start(), SCHEDULE, n)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "timesteps", [[1, 2], [5, 5], [1000, 3], [3, -1], [], 20.0, [3.5, 1], "many"]
)
def test_timesteps_are_checked(name, timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        SAMPLERS[name](toy, start(), SCHEDULE, timesteps)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_is_checked(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim(toy, start(), SCHEDULE, 10, eta=eta)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("final", [0.0, 1.1, float("nan")])
def test_final_alpha_bar_is_checked(name, final):
    with pytest.raises(ValueError, match="final_alpha_bar"):
        SAMPLERS[name](toy, start(), SCHEDULE, 10, final_alpha_bar=final)


def test_the_sde_forgets_an_early_error_that_the_ode_keeps():
    """A denoiser that is wrong until step 500, and exact from there on."""
    z = torch.randn((20, 1, 50, 50), generator=seeded(0))
    grid = spaced_timesteps(1000, 100, power=2)

    def late(z, t):
        return gaussian(z, t) + (0.3 if int(t[0]) >= 500 else 0.0)

    def error(sampler):
        return abs(sampler(late, z, SCHEDULE, grid, generator=seeded(1)).mean().item() - MU)

    assert error(sde_dpm_solver_pp) < error(dpm_solver_pp) / 2


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sde_dpm_solver_pp"])
def test_generator_is_checked(name):
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="cuda"):
        SAMPLERS[name](toy, start(), SCHEDULE, 10, generator=Elsewhere())


def test_unknown_sampler():
    with pytest.raises(ValueError, match="euler.*dpm_solver_pp"):
        get_sampler("euler")


@pytest.mark.parametrize(
    ("name", "power"),
    [("ddpm", 1), ("ddim", 1), ("dpm_solver_pp", 2), ("sde_dpm_solver_pp", 2)],
)
def test_sampling_takes_the_grid_that_suits_its_sampler(name, power):
    sampling = Sampling(6, name, seed=3)
    out = sampling.run(toy, start(), SCHEDULE, sampling.generator())
    grid = spaced_timesteps(1000, 6, power)
    expected = SAMPLERS[name](toy, start(), SCHEDULE, grid, generator=seeded(3))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_numbers_of_numpys_are_integers():
    sampling = Sampling(seed=np.int64(3), steps=np.int64(4))
    assert sampling == Sampling(seed=3, steps=4)
    assert type(sampling.seed) is type(sampling.steps) is int
    for seed in (True, 3.0, "3", 2**64):
        with pytest.raises(ValueError, match="seed"):
            Sampling(seed=seed)
