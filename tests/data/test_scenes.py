"""Continuous scenes: the same function whatever the size, the window or the batch."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from arbscale import coords
from arbscale.data import Scenes, render_scenes, sample_scenes, scene_colors


def psnr(a, b):
    """Return the PSNR of each image of two batches in [-1, 1]."""
    return -10 * ((a - b) / 2).pow(2).mean(dim=(1, 2, 3)).log10()


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scenes))


def test_scene_i_does_not_depend_on_how_many_are_drawn():
    many = sample_scenes(50, seed=3)
    assert same(many[17:21], sample_scenes(4, seed=3, first=17))
    assert same(many, sample_scenes(50, seed=3))
    assert not same(many, sample_scenes(50, seed=4))
    assert not same(many, sample_scenes(50, seed=3, first=1))


def test_scenes_far_along_and_odd_seeds():
    assert len(sample_scenes(2, seed=-5, first=2**31)) == 2
    assert not same(sample_scenes(2, first=2**31), sample_scenes(2))
    assert len(sample_scenes(0)) == 0
    with pytest.raises(ValueError, match="n=-1"):
        sample_scenes(-1)


def test_parameters_are_spread_evenly():
    scenes = sample_scenes(8000)
    for choice in (scenes.mood, scenes.field):
        shares = torch.bincount(choice, minlength=4) / len(scenes)
        assert (shares - 0.25).abs().max() < 0.02
    assert abs((scenes.lake < 2).float().mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([scenes.sun[:, 0], scenes.sun[:, 1]]))[0, 1]) < 0.05


@pytest.mark.slow
def test_sampling_is_fast_enough_to_draw_while_training():
    assert len(sample_scenes(100_000)) == 100_000  # a loop over scenes would take minutes


def test_the_first_scenes_stay_what_they_were():
    """Weights are trained on these images: a changed scene means changed data."""
    means = render_scenes(sample_scenes(4), 16).mean(dim=(2, 3))
    expected = torch.tensor(
        [
            [0.14, 0.212, 0.408],
            [-0.201, 0.253, 0.573],
            [0.146, -0.369, -0.295],
            [-0.68, -0.549, -0.191],
        ]
    )
    torch.testing.assert_close(means, expected, atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 33, 64, 100])
def test_a_size_is_the_reduction_of_four_times_that_size(size):
    scenes = sample_scenes(48)
    reduced = F.avg_pool2d(render_scenes(scenes, 4 * size), 4)
    assert psnr(render_scenes(scenes, size), reduced).min() > (32 if size < 30 else 37)


def test_antialiasing_is_what_makes_sizes_agree():
    scenes = sample_scenes(16)
    points = coords.grid((32, 32)).flatten(0, 1).expand(16, -1, 2)
    no_extent = torch.full((16, 2), 1e-4)
    hard = scene_colors(scenes, points, no_extent).transpose(1, 2).unflatten(2, (32, 32))
    truth = F.avg_pool2d(render_scenes(scenes, 256), 8)
    assert (psnr(render_scenes(scenes, 32), truth) > psnr(hard, truth) + 5).all()


def test_not_square_is_the_square_reduced_along_one_axis():
    scenes = sample_scenes(24)
    narrow = F.avg_pool2d(render_scenes(scenes, 128), (1, 4))
    assert psnr(render_scenes(scenes, (128, 32)), narrow).min() > 33


def test_window_is_the_crop(monkeypatch):
    scenes = sample_scenes(3)
    whole = render_scenes(scenes, (90, 131))
    window = render_scenes(scenes, (90, 131), window=(7, 100, 50, 31))
    torch.testing.assert_close(window, whole[:, :, 7:57, 100:], atol=1e-5, rtol=0)
    monkeypatch.setattr("arbscale.data.scenes._POINTS", 1000)  # many blocks, one scene at a time
    torch.testing.assert_close(render_scenes(scenes, (90, 131)), whole, atol=1e-5, rtol=0)


def test_a_window_of_a_huge_image_needs_little():
    window = render_scenes(sample_scenes(1), 100_000, window=(60_000, 50_000, 32, 32))
    assert window.shape == (1, 3, 32, 32) and window.isfinite().all()


def test_scattered_points_are_the_pixels():
    scenes = sample_scenes(5)
    image = render_scenes(scenes, 48)
    index = torch.randint(48 * 48, (5, 200), generator=torch.Generator().manual_seed(0))
    points = coords.grid((48, 48)).flatten(0, 1)[index]  # (5, 200, 2)
    colours = scene_colors(scenes, points, coords.cell((48, 48)).expand(5, 2))
    pixels = image.flatten(2).transpose(1, 2).gather(1, index[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(colours, pixels, atol=1e-5, rtol=0)


def test_each_scene_has_its_own_pixel_extent():
    scenes = sample_scenes(2)
    points = torch.rand(2, 50, 2) * 2 - 1
    cells = torch.tensor([[0.5, 0.1], [0.01, 0.02]])
    both = scene_colors(scenes, points, cells)
    second = scene_colors(scenes[1:], points[1:], cells[1:])
    torch.testing.assert_close(both[1:], second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, (1, 7), (64, 64)])
def test_colours_are_finite_and_in_range(size):
    image = render_scenes(sample_scenes(200), size)
    assert image.shape == (200, 3, *coords.check_size(size)) and image.dtype == torch.float32
    assert image.isfinite().all() and image.abs().max() <= 1


def test_points_outside_the_image_are_harmless():
    points = torch.tensor([[-5.0, 3.0], [5.0, -3.0], [0.0, 1.0], [1.0, 1.0]]).expand(20, 4, 2)
    assert scene_colors(sample_scenes(20), points, torch.full((20, 2), 0.03)).isfinite().all()


def test_disagreeing_shapes_are_refused():
    scenes = sample_scenes(2)
    with pytest.raises(ValueError, match=r"\(3, 10, 2\)"):
        scene_colors(scenes, torch.zeros(3, 10, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        scene_colors(scenes, torch.zeros(2, 10, 2), torch.ones(2))
    with pytest.raises(ValueError, match="size"):
        render_scenes(scenes, 0)
    with pytest.raises(ValueError, match="window"):
        render_scenes(scenes, 32, window=(0, 0, 33, 32))
    assert render_scenes(scenes[:0], 8).shape == (0, 3, 8, 8)
