"""The schedule and the two losses, by hand and by algebra."""

import math

import pytest
import torch

from arbscale.diffusion import NoiseSchedule, alignment_loss, denoising_loss


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SCHEDULE = NoiseSchedule(0.0015, 0.0195, 1000)
T = torch.tensor([0, 400, 999])
Z0, EPS, IMAGE = noise(3, 2, 4, 5), noise(3, 2, 4, 5, seed=1), noise(3, 3, 8, 10, seed=2)


def denoise(z, t):
    return 0.3 * z + t.view(-1, 1, 1, 1) / 1000


def decode(z):
    """Stand in for a frozen decoder: smooth, to another size and number of channels."""
    rgb = torch.stack([z[:, 0], z[:, 1], z.mean(1)], dim=1).tanh()
    return torch.nn.functional.interpolate(rgb, scale_factor=2.0)


def test_schedule_by_hand():
    schedule = NoiseSchedule(0.01, 0.04, 3)
    assert schedule.betas.tolist() == pytest.approx([0.01, 0.0225, 0.04])
    expected = [0.99, 0.99 * 0.9775, 0.99 * 0.9775 * 0.96]
    assert schedule.alpha_bar.tolist() == pytest.approx(expected)
    assert schedule.alpha_bar.dtype == torch.float64


@pytest.mark.parametrize(
    "arguments",
    [(0, 0.1, 10), (-0.1, 0.1, 10), (0.2, 0.1, 10), (0.1, 1, 10), (0.1, 0.2, 0), (math.nan, 1, 5)],
)
def test_a_schedule_is_checked(arguments):
    with pytest.raises(ValueError, match="beta_start"):
        NoiseSchedule(*arguments)


def test_alpha_bar_takes_the_latents_dtype():
    at = SCHEDULE.at(T, torch.zeros(3, 1, 1, 1))
    assert at.shape == (3, 1, 1, 1) and at.dtype == torch.float32


def test_latents_of_half_precision_get_the_noise_of_their_step():
    z_t = SCHEDULE.add_noise(torch.zeros(1, 1, 1, 1).bfloat16(), torch.tensor([0]), torch.ones(1))
    assert z_t.item() == pytest.approx(SCHEDULE.betas[0].item() ** 0.5, rel=1e-5)


def test_the_paper_s_weights_at_the_first_step():
    assert SCHEDULE.weight(torch.tensor([0])).item() == pytest.approx(1 / 0.0015 - 1)
    assert NoiseSchedule(0.0001, 0.015).weight(torch.tensor([0])).item() == pytest.approx(9_999)


def test_predict_z0_inverts_add_noise():
    z_t = SCHEDULE.add_noise(Z0, T, EPS)
    torch.testing.assert_close(SCHEDULE.predict_z0(z_t, T, EPS), Z0)


def test_noise_keeps_unit_variance():
    z_t = SCHEDULE.add_noise(noise(1, 1, 300, 300), T[1:2], noise(1, 1, 300, 300, seed=1))
    assert z_t.std().item() == pytest.approx(1, abs=0.01)


def test_denoising_loss_by_hand():
    losses = denoising_loss(denoise, Z0, T, EPS, SCHEDULE)
    assert losses.shape == (3,)
    for i, t in enumerate(T.tolist()):
        a = SCHEDULE.alpha_bar[t].item()
        error = 0.3 * (a**0.5 * Z0[i] + (1 - a) ** 0.5 * EPS[i]) + t / 1000 - EPS[i]
        assert losses[i].item() == pytest.approx((error**2).mean().item())


def test_a_perfect_denoiser_has_no_loss():
    assert denoising_loss(lambda z, t: EPS, Z0, T, EPS, SCHEDULE).tolist() == [0, 0, 0]
    latent, image = alignment_loss(lambda z, t: EPS, decode, Z0, decode(Z0), T, EPS, SCHEDULE)
    assert latent.tolist() == [0, 0, 0]
    torch.testing.assert_close(image, torch.zeros(3, dtype=torch.float64))


def test_alignment_loss_by_hand():
    latent, image = alignment_loss(denoise, decode, Z0, IMAGE, T, EPS, SCHEDULE)
    assert latent.shape == image.shape == (3,)
    for i, t in enumerate(T.tolist()):
        a = SCHEDULE.alpha_bar[t].item()
        z_t = a**0.5 * Z0[i] + (1 - a) ** 0.5 * EPS[i]
        z0_hat = (z_t - (1 - a) ** 0.5 * (0.3 * z_t + t / 1000)) / a**0.5
        weight = a / (1 - a)
        expected = weight * ((IMAGE[i] - decode(z0_hat[None])[0]) ** 2).mean()
        assert image[i].item() == pytest.approx(expected.item())
        # The equation's own form of the latent term.
        expected = weight * ((Z0[i] - z0_hat) ** 2).mean()
        assert latent[i].item() == pytest.approx(expected.item())


def test_the_latent_term_is_the_noise_error():
    latent, _ = alignment_loss(denoise, decode, Z0, IMAGE, T, EPS, SCHEDULE)
    torch.testing.assert_close(latent, denoising_loss(denoise, Z0, T, EPS, SCHEDULE))


def test_a_clamp_concerns_the_image_term_alone():
    free = alignment_loss(denoise, decode, Z0, IMAGE, T, EPS, SCHEDULE)
    clamped = alignment_loss(denoise, decode, Z0, IMAGE, T, EPS, SCHEDULE, max_weight=5.0)
    assert torch.equal(free[0], clamped[0])
    weight = SCHEDULE.weight(T)
    assert weight[0] > 5 > weight[1]
    torch.testing.assert_close(clamped[1], free[1] * weight.clamp(max=5.0) / weight)
    latent, image = alignment_loss(denoise, None, Z0, IMAGE, T, EPS, SCHEDULE, max_weight=0.0)
    assert torch.equal(latent, free[0]) and (image == 0).all()  # nothing was decoded


def test_gradients_reach_the_denoiser_through_a_frozen_decoder():
    net = torch.nn.Conv2d(2, 2, 1).double()
    decoder = torch.nn.Conv2d(2, 3, 1).double().requires_grad_(False)
    image = noise(3, 3, 4, 5)
    _, term = alignment_loss(lambda z, t: net(z), decoder, Z0, image, T, EPS, SCHEDULE)
    term.mean().backward()
    assert (net.weight.grad != 0).all() and (net.bias.grad != 0).all()
    assert decoder.weight.grad is None


def test_the_two_terms_pull_differently():
    gradients = []
    for k in range(2):
        net = torch.nn.Conv2d(2, 2, 1, bias=False).double()
        torch.nn.init.eye_(net.weight[:, :, 0, 0])
        alignment_loss(lambda z, t, net=net: net(z), decode, Z0, IMAGE, T, EPS, SCHEDULE)[
            k
        ].mean().backward()
        gradients.append(net.weight.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0).abs() < 0.999
