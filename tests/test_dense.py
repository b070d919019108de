"""Rendering a grid against asking for its points one by one."""

import pytest
import torch

from arbscale.coords import cell, grid, pixel_centres
from arbscale.liif import LIIF, InterpolatedLIIF

HEADS = pytest.mark.parametrize(
    "build",
    [
        lambda: LIIF(5, (16, 12)),
        lambda: LIIF(5, (16,), local_ensemble=False, cell_decode=False),
        lambda: InterpolatedLIIF(5, (16, 12), finer=2),
        lambda: InterpolatedLIIF(5, (16,), cell_decode=False, finer=3),
    ],
    ids=["liif", "liif-nearest", "interpolated", "interpolated-plain"],
)


@pytest.fixture
def head(build):
    torch.manual_seed(0)
    return build()


def features(h: int, w: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 5, h, w, generator=torch.Generator().manual_seed(0))


def by_points(head, f, size, window=None):
    coords = grid(size, window).view(1, -1, 2).expand(len(f), -1, -1)
    rgb = head.query(f, coords, cell(size).expand(len(f), 2))
    return rgb.mT.reshape(len(f), 3, *(window or (0, 0, *size))[2:])


@HEADS
@pytest.mark.parametrize(
    ("latent", "size", "window"),
    [
        ((5, 4), (23, 9), None),
        ((1, 3), (64, 192), None),  # x64
        ((9, 8), (3, 2), None),  # below the latent
        ((2, 70), (130, 3), None),  # a table wider than the image
        ((3, 4), (5, 1500), None),  # wider than a block
        ((3, 4), (99_991, 70_001), (99_000, 41, 7, 1100)),
        ((13, 16), (40, 60), (18, 22, 3, 9)),  # among a few of the features
        ((13, 16), (40, 60), (0, 50, 3, 10)),  # in a corner
    ],
    ids=str,
)
def test_a_grid_is_its_points(head, latent, size, window):
    f = features(*latent, batch=2)
    with torch.no_grad():
        rgb, expected = head.render(f, size, window), by_points(head, f, size, window)
    torch.testing.assert_close(rgb, expected, atol=1e-5, rtol=0)


@HEADS
def test_rows_and_columns_may_lie_anywhere(head):
    f, y, x = features(4, 5), torch.tensor([0.9, -0.3]), torch.tensor([-1.0, 0.5, 0.1])
    cells = torch.tensor([[0.1, 0.2]])
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(1, -1, 2)
    with torch.no_grad():
        rgb = head.query_grid(f, y, x, cells)
        expected = head.query(f, points, cells).mT.view(1, 3, 2, 3)
    torch.testing.assert_close(rgb, expected, atol=1e-6, rtol=0)


@HEADS
def test_gradients_are_those_of_the_points(head):
    found = []
    for render in (head.render, lambda f, size: by_points(head, f, size)):
        f = features(3, 4, batch=2).requires_grad_()
        loss = render(f, (12, 17)).square().mean()
        found.append(torch.autograd.grad(loss, [f, *head.parameters()]))
    for dense, scattered in zip(*found, strict=True):
        torch.testing.assert_close(dense, scattered, atol=1e-6, rtol=1e-4)


@HEADS
def test_bfloat16_follows_float32(head):
    f = features(6, 5)
    exact = head.render(f, (40, 30))
    with torch.autocast("cpu", torch.bfloat16):
        rgb = head.render(f, (40, 30))
    assert rgb.isfinite().all()
    assert (rgb - exact).abs().mean() < 0.02 * exact.abs().mean()


@HEADS
def test_an_empty_batch_is_refused(head):
    with pytest.raises(ValueError, match=r"features .*\(0, 5, 3, 3\)"):
        head.render(features(3, 3, batch=0), 4)


@HEADS
def test_cells_must_fit_the_batch(head):
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        head.query_grid(
            features(3, 3, batch=2), pixel_centres(4), pixel_centres(4), cell((4, 4))[None]
        )
