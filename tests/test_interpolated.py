"""The interpolated head against loops written from its description."""

import math

import numpy as np
import pytest
import torch

from arbscale.coords import cell, grid
from arbscale.liif import InterpolatedLIIF

OPTIONS = [(True, 1), (False, 1), (True, 2), (True, 3)]


def build(cells: bool = True, finer: int = 2, channels: int = 5) -> InterpolatedLIIF:
    torch.manual_seed(0)
    return InterpolatedLIIF(channels, (16, 12), cells, finer)


def features(h: int, w: int, batch: int = 1, channels: int = 5) -> torch.Tensor:
    return torch.randn(batch, channels, h, w, generator=torch.Generator().manual_seed(0))


def between(row: int, n_out: int, n_grid: int) -> tuple[int, int, float]:
    """Return the grid pixels around output pixel `row` along one axis, and the second's share."""
    u = (2 * row + 1) * n_grid / (2 * n_out) - 0.5  # in grid pixels from the first centre
    u = min(max(u, 0), n_grid - 1)
    before = math.floor(u)
    return before, min(before + 1, n_grid - 1), u - before


def oracle(head: InterpolatedLIIF, feature: torch.Tensor, size, window=None) -> torch.Tensor:
    """Render one image (C, h, w) -> (3, H, W): rows, columns, 2 x 2 grid pixels."""
    state = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    f, r = feature.double().numpy(), head.finer
    (height, width), (h, w) = size, f.shape[1:]
    first = state["first.weight"]  # (hidden * r * r, C, 3, 3), r * r outputs side by side
    table = np.zeros((h * r, w * r, len(first) // r**2))
    for y in range(h * r):
        for x in range(w * r):
            out = state["first.bias"].copy()
            for i in range(3):
                for j in range(3):
                    row = min(max(y // r + i - 1, 0), h - 1)
                    col = min(max(x // r + j - 1, 0), w - 1)
                    out += first[:, :, i, j] @ f[:, row, col]
            table[y, x] = out[(y % r) * r + x % r :: r**2]
    top, left, rows, cols = window or (0, 0, height, width)
    image = np.zeros((3, rows, cols))
    for row in range(rows):
        y0, y1, dy = between(top + row, height, h * r)
        for col in range(cols):
            x0, x1, dx = between(left + col, width, w * r)
            upper = (1 - dx) * table[y0, x0] + dx * table[y0, x1]
            lower = (1 - dx) * table[y1, x0] + dx * table[y1, x1]
            place = (
                (2 * (top + row) + 1) * h / (2 * height),
                (2 * (left + col) + 1) * w / (2 * width),
            )
            angles = [2 * math.pi * p for p in place]
            code = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            extent = [2 * h / height, 2 * w / width] if head.cell_decode else []
            value = (1 - dy) * upper + dy * lower + state["place.weight"] @ [*code, *extent]
            for i in range(len(head.layers)):
                value = state[f"layers.{i}.weight"] @ np.maximum(value, 0)
                value = value + state[f"layers.{i}.bias"]
            image[:, row, col] = value
    return torch.from_numpy(image).float()


def check(head, f, size, window=None, tolerance=2e-5, **options):
    with torch.no_grad():
        ours = head.render(f, size, window, **options)
    for image, feature in zip(ours, f, strict=True):
        expected = oracle(head, feature, size, window)
        assert image.shape == expected.shape
        assert (image - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize(("cells", "finer"), OPTIONS)
@pytest.mark.parametrize(
    "size", [(5, 4), (10, 8), (7, 13), (23, 9), (1, 31), (1, 1), (2, 3), (60, 41)], ids=str
)
def test_render_equals_the_description(size, cells, finer):
    check(build(cells, finer), features(5, 4), size)


@pytest.mark.parametrize("latent", [(1, 1), (1, 5), (4, 1)], ids=str)
def test_a_single_row_or_column_of_latent_pixels(latent):
    check(build(), features(*latent), (6, 7))


@pytest.mark.parametrize("window", [(0, 0, 4, 5), (17, 3, 6, 20), (22, 22, 1, 1)])
def test_a_window_equals_the_description_and_the_crop(window):
    head, f = build(), features(5, 4, batch=2)
    check(head, f, (23, 23), window)
    top, left, height, width = window
    with torch.no_grad():
        crop = head.render(f, (23, 23))[..., top : top + height, left : left + width]
        torch.testing.assert_close(head.render(f, (23, 23), window), crop, atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_blocks_change_nothing(block, monkeypatch):
    head, f = build(), features(5, 4, batch=2)
    with torch.no_grad():
        whole = head.render(f, (11, 13))
        monkeypatch.setattr("arbscale.liif.BLOCK", block)
        torch.testing.assert_close(head.render(f, (11, 13)), whole, atol=1e-6, rtol=0)


def test_query_at_pixel_centres_is_render():
    head, f, size = build(), features(5, 4, batch=2), (11, 6)
    picks = torch.randint(66, (2, 20), generator=torch.Generator().manual_seed(0))
    coords, cells = grid(size).view(-1, 2)[picks], cell(size).expand(2, 2)
    with torch.no_grad():
        rgb = head.query(f, coords, cells)
        pixels = head.render(f, size).flatten(2).mT  # (B, H*W, 3)
    expected = pixels.gather(1, picks[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(rgb, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("finer", [1, 2])
def test_it_is_continuous_across_the_borders_of_latent_pixels(finer):
    """Steps between neighbouring points shrink in proportion when the points come closer."""
    steps = []
    for n in (1_000, 10_000):
        with torch.no_grad():
            head, f = build(cells=False, finer=finer), features(3, 2)
            column = head.render(f, (n, 1))[0, :, :, 0]
        steps.append(column.diff(dim=1).abs().max().item())
    assert steps[1] < steps[0] / 8


@pytest.mark.parametrize(("cells", "finer"), OPTIONS)
def test_gradients_reach_every_feature_and_weight(cells, finer):
    head, f = build(cells, finer), features(3, 4).requires_grad_()
    head.render(f, (12, 17)).square().mean().backward()
    assert (f.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 4\)"):
        build().render(features(5, 4, channels=4), (8, 8))
