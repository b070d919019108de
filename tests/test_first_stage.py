"""The first stage: its parts in order, and nothing hidden between calls."""

import dataclasses

import pytest
import torch

from arbscale import presets


def build(**changes):
    torch.manual_seed(0)
    return presets.build_first_stage(dataclasses.replace(presets.tiny(), **changes)).eval()


def image(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_decode_is_features_then_render():
    stage = build()
    z = stage.encode(image(8, 12))
    assert z.shape == (2, 3, 4, 6)
    features = stage.features(z)
    assert features.shape == (2, 32, 4, 6)
    picture = stage.decode(z, (13, 7))
    assert picture.shape == (2, 3, 13, 7)
    assert torch.equal(picture, stage.render(features, (13, 7)))


@torch.no_grad()
def test_a_window_is_a_crop():
    stage = build()
    z = stage.encode(image(8, 8))
    window = stage.decode(z, (31, 20), (5, 3, 10, 11))
    torch.testing.assert_close(
        window, stage.decode(z, (31, 20))[:, :, 5:15, 3:14], atol=1e-6, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 3), (4, 9), (1, 2)])
def test_what_is_smaller_than_any_target_is_an_average(size):
    """LIIF alone, asked for pixels larger than it has seen, gives colours of its own."""
    stage = build(image_size=16, target_sizes=(8, 32))  # f = 2: from one pixel for a latent pixel
    features = stage.features(stage.encode(image(16, 16)))
    n = 8 // min(size) + (8 % min(size) > 0)
    larger = stage.liif.render(features, (n * size[0], n * size[1]))
    expected = larger.unflatten(3, (-1, n)).unflatten(2, (-1, n)).mean((3, 5))
    small = stage.render(features, size)
    torch.testing.assert_close(small, expected, atol=1e-5, rtol=0)
    top, width = size[0] - 1, size[1] - 1
    part = stage.render(features, size, (top, 1, 1, width))
    torch.testing.assert_close(part, small[:, :, top:, 1:], atol=1e-5, rtol=0)
    assert torch.equal(stage.render(features, (8, 8)), stage.liif.render(features, (8, 8)))


@torch.no_grad()
def test_calls_leave_no_trace():
    """Another picture in between changes nothing."""
    stage = build()
    features = stage.features(stage.encode(image(8, 8)))
    before = stage.render(features, 11)
    stage.decode(stage.encode(image(16, 4)), 5)
    assert torch.equal(before, stage.render(features, 11))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_factor(levels):
    assert build(multipliers=(1,) * levels).factor == 2 ** (levels - 1)


@torch.no_grad()
def test_the_latent_is_the_posteriors_mode():
    stage = build(posterior=True)
    posterior = stage.posterior(image(8, 8))
    assert torch.equal(stage.encode(image(8, 8)), posterior.mode)
    assert posterior.logvar.shape == (2, 3, 4, 4)
    assert stage.decode(posterior.sample(), 9).shape == (2, 3, 9, 9)


def test_without_a_posterior_there_is_none():
    with pytest.raises(RuntimeError, match="posterior"):
        build().posterior(image(8, 8))
