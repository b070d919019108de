"""Where pixels are, and what is refused as a size, a scale or a window."""

import math

import pytest
import torch

from arbscale.coords import cell, check_size, check_window, grid, pixel_centres, scaled_size


def test_a_size_is_an_integer_or_a_pair():
    assert check_size(7) == (7, 7)
    assert check_size((3, 5)) == (3, 5)
    assert check_size([3, 5]) == (3, 5)
    assert check_size(torch.zeros(3, 5).shape) == (3, 5)


@pytest.mark.parametrize("size", [0, -1, (3, 0), (3,), (1, 2, 3), (2.5, 3), 2.5, "large", None])
def test_anything_else_is_refused_with_an_example(size):
    with pytest.raises(ValueError, match="size"):
        check_size(size)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((16, 16), 3.7, (59, 59)),
        ((10, 20), 1, (10, 20)),
        ((3, 100), 0.1, (1, 10)),
        ((1, 4), 0.01, (1, 1)),
        ((3, 2), 30.5, (92, 61)),
    ],
)
def test_scaled_size(size, scale, expected):
    assert scaled_size(size, scale) == expected


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, -math.inf])
def test_a_scale_is_positive_and_finite(scale):
    with pytest.raises(ValueError, match="scale"):
        scaled_size((4, 4), scale)


def test_pixel_centres_by_hand():
    assert pixel_centres(1).tolist() == [0.0]
    assert pixel_centres(2).tolist() == [-0.5, 0.5]
    assert pixel_centres(4).tolist() == [-0.75, -0.25, 0.25, 0.75]


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1001])
def test_centres_are_symmetric_and_one_cell_apart(n):
    x = pixel_centres(n)
    torch.testing.assert_close(x, -x.flip(0), atol=2e-7, rtol=0)
    if n > 1:
        torch.testing.assert_close(x.diff(), torch.full((n - 1,), 2 / n), atol=2e-7, rtol=0)


def test_grid_is_y_before_x():
    points = grid((2, 4))
    assert points.shape == (2, 4, 2)
    assert points[0, 3].tolist() == [-0.5, 0.75]
    assert points[1, 0].tolist() == [0.5, -0.75]


def test_a_window_of_the_grid_is_a_crop_of_it():
    assert torch.equal(grid((9, 7), (2, 1, 3, 4)), grid((9, 7))[2:5, 1:5])


def test_cell():
    assert cell((4, 10)).tolist() == pytest.approx([0.5, 0.2])


def test_windows():
    assert check_window(None, (3, 5)) == (0, 0, 3, 5)
    assert check_window((1, 2, 2, 3), (3, 5)) == (1, 2, 2, 3)


@pytest.mark.parametrize(
    "window",
    [(-1, 0, 2, 2), (0, -1, 2, 2), (2, 0, 2, 2), (0, 4, 1, 2), (0, 0, 0, 2), (0, 0, 2, 0)],
)
def test_a_window_lies_inside(window):
    with pytest.raises(ValueError, match="3 x 5"):
        check_window(window, (3, 5))
