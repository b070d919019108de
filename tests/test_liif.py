"""LIIF against four loops written from its equation."""

import numpy as np
import pytest
import torch

from arbscale.coords import cell, grid
from arbscale.liif import BLOCK, LIIF

OPTIONS = [(True, True), (True, False), (False, True), (False, False)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(ensemble: bool = True, cells: bool = True, channels: int = 5) -> LIIF:
    torch.manual_seed(0)
    return LIIF(channels, (16, 12), ensemble, cells)


def features(h: int, w: int, batch: int = 1, channels: int = 5) -> torch.Tensor:
    return torch.randn(batch, channels, h, w, generator=seeded())


def neighbours(row: int, n_out: int, n_latent: int, ensemble: bool) -> list[tuple[int, float]]:
    """Index and offset of the latent pixels that output pixel `row` looks at, along one axis.

    Its centre is at u = (2 row + 1) n_latent / (2 n_out) latent pixels from the picture's edge. The
    two neighbours hold u - 1/2 and u + 1/2; whole numbers keep ties exact.
    """
    found = []
    for shift in (-1, 1) if ensemble else (0,):
        index = ((2 * row + 1) * n_latent + shift * n_out) // (2 * n_out)
        index = min(max(index, 0), n_latent - 1)
        u = (2 * row + 1) * n_latent / (2 * n_out)
        found.append((index, 2 * (u - (index + 0.5))))  # one latent pixel is 2 wide
    return found


def oracle(liif: LIIF, grid_of_features: torch.Tensor, size, window=None) -> torch.Tensor:
    """Render one picture (C, h, w) -> (3, H, W): rows, columns, 2 x 2 neighbours."""
    feature = grid_of_features.double().numpy()
    weights = [
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in liif.layers
    ]
    (height, width), (h, w) = size, feature.shape[1:]
    top, left, rows, cols = window or (0, 0, height, width)
    extent = [2 / height * h, 2 / width * w] if liif.cell_decode else []
    out = np.zeros((3, rows, cols))
    for row in range(rows):
        ys = neighbours(top + row, height, h, liif.local_ensemble)
        for col in range(cols):
            xs = neighbours(left + col, width, w, liif.local_ensemble)
            colours, areas = [], []
            for i, (y, dy) in enumerate(ys):
                for j, (x, dx) in enumerate(xs):
                    value = np.concatenate([feature[:, y, x], [dy, dx], extent])
                    for layer, (weight, bias) in enumerate(weights):
                        value = weight @ value + bias
                        if layer < len(weights) - 1:
                            value = np.maximum(value, 0)
                    colours.append(value)
                    areas.append(abs(ys[-1 - i][1] * xs[-1 - j][1]))
            areas = np.array(areas) if sum(areas) else np.ones(len(areas))  # 0 / 0: equal parts
            out[:, row, col] = np.array(colours).T @ areas / areas.sum()
    return torch.from_numpy(out).float()


def check(liif, f, size, window=None, tolerance=1e-5, **options):
    with torch.no_grad():
        ours = liif.render(f, size, window, **options)
    for picture, feature in zip(ours, f, strict=True):
        expected = oracle(liif, feature, size, window)
        assert picture.shape == expected.shape
        assert (picture - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize(("ensemble", "cells"), OPTIONS)
@pytest.mark.parametrize(
    "size",
    [(5, 4), (10, 8), (15, 12), (7, 13), (23, 9), (1, 31), (3, 2), (1, 1), (2, 3)],
    ids=str,
)
def test_render_equals_the_equation(size, ensemble, cells):
    """Odd and even, square and not, integer scales (all ties), scales below 1."""
    check(build(ensemble, cells), features(5, 4), size)


@pytest.mark.parametrize(("ensemble", "cells"), OPTIONS)
@pytest.mark.parametrize("latent", [(4, 6), (6, 4), (8, 2)], ids=str)
def test_a_point_on_the_border_belongs_to_the_pixel_after_it(latent, ensemble, cells):
    check(build(ensemble, cells), features(*latent), (2, 2))


@pytest.mark.parametrize(("ensemble", "cells"), OPTIONS)
def test_scale_above_thirty(ensemble, cells):
    check(build(ensemble, cells), features(3, 2), (100, 67))


@pytest.mark.parametrize("size", [(6, 7), (8, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("latent", [(1, 1), (1, 5), (4, 1)], ids=str)
def test_a_single_row_or_column_of_latent_pixels(latent, size):
    check(build(), features(*latent), size)


@pytest.mark.parametrize(("ensemble", "cells"), OPTIONS)
@pytest.mark.parametrize("window", [(0, 0, 4, 5), (17, 3, 6, 20), (22, 22, 1, 1), (0, 5, 23, 2)])
def test_a_window_equals_the_equation_and_the_crop(window, ensemble, cells):
    liif, f = build(ensemble, cells), features(5, 4)
    check(liif, f, (23, 23), window)
    top, left, height, width = window
    with torch.no_grad():
        crop = liif.render(f, (23, 23))[..., top : top + height, left : left + width]
        torch.testing.assert_close(liif.render(f, (23, 23), window), crop, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize(
    "window", [(49_995, 8_740, 10, 6), (99_992, 69_993, 8, 7), (0, 0, 5, 5)], ids=str
)
def test_a_window_of_a_virtual_huge_picture(window, ensemble):
    check(build(ensemble), features(3, 4), (100_000, 70_000), window, tolerance=2e-5)


@pytest.mark.parametrize("latent", [(31, 33), (64, 16)], ids=str)
def test_larger_latents(latent):
    check(build(), features(*latent), (25, 19))


def test_batch():
    check(build(), features(4, 3, batch=3), (9, 7))


def test_a_picture_does_not_depend_on_its_batch():
    liif, f = build(), features(4, 3, batch=3)
    with torch.no_grad():
        alone = torch.cat([liif.render(one[None], (9, 7)) for one in f])
        torch.testing.assert_close(liif.render(f, (9, 7)), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 100, 10_000])
def test_blocks_change_nothing(block, monkeypatch):
    liif, f = build(), features(5, 4, batch=2)
    with torch.no_grad():
        whole = liif.render(f, (11, 13))
        monkeypatch.setattr("arbscale.liif.BLOCK", block)
        torch.testing.assert_close(liif.render(f, (11, 13)), whole, atol=1e-6, rtol=0)


def test_blocks_change_no_gradient(monkeypatch):
    gradients = []
    for block in (10_000, 10):
        monkeypatch.setattr("arbscale.liif.BLOCK", block)
        liif, f = build(), features(5, 4).requires_grad_()
        liif.render(f, (9, 8)).square().mean().backward()
        gradients.append([f.grad, *(p.grad for p in liif.parameters())])
    for whole, blocked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, blocked, atol=1e-6, rtol=1e-5)


def test_blocks_are_on_by_default_and_bound_the_work():
    liif, rows = build(), []
    liif.layers[1].register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        liif.render(features(4, 4), (70, 70))
    assert max(rows) <= BLOCK < 70 * 70
    assert sum(rows) == 4 * 70 * 70


def test_query_at_pixel_centres_is_render():
    liif, f = build(), features(5, 4, batch=2)
    size = (11, 6)
    picks = torch.randint(66, (2, 20), generator=seeded())  # other points for each picture
    coords, cells = grid(size).view(-1, 2)[picks], cell(size).expand(2, 2)
    with torch.no_grad():
        rgb = liif.query(f, coords, cells)
        pixels = liif.render(f, size).flatten(2).mT  # (B, H*W, 3)
    assert rgb.shape == (2, 20, 3)
    expected = pixels.gather(1, picks[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(rgb, expected, atol=1e-6, rtol=0)


def test_cells_are_each_pictures_own():
    liif, f = build(), features(5, 4).expand(2, -1, -1, -1)
    coords = grid((3, 3)).view(1, -1, 2).expand(2, -1, -1)
    with torch.no_grad():
        rgb = liif.query(f, coords, torch.tensor([[0.1, 0.1], [0.9, 0.3]]))
    assert (rgb[0] - rgb[1]).abs().max() > 1e-3


def test_no_points_are_no_work():
    rgb = build().query(features(5, 4), torch.zeros(1, 0, 2), torch.ones(1, 2))
    assert rgb.shape == (1, 0, 3)


@pytest.mark.parametrize(("ensemble", "cells"), OPTIONS)
def test_gradients_reach_every_feature_and_weight(ensemble, cells):
    liif, f = build(ensemble, cells), features(3, 4).requires_grad_()
    liif.render(f, (12, 16)).square().mean().backward()
    assert (f.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in liif.parameters())


def test_the_local_ensemble_is_continuous():
    """Across the border of two latent pixels the blend goes on; the nearest answer jumps."""
    steps = []
    for ensemble in (True, False):
        with torch.no_grad():
            column = build(ensemble).render(features(2, 2), (2_000, 1))[0, :, :, 0]
        steps.append(column.diff(dim=1).abs().max().item())
    assert steps[0] < steps[1] / 10


def test_layers_are_plain():
    liif = LIIF(128)
    assert [layer.in_features for layer in liif.layers] == [132, 256, 256, 256, 256]
    assert liif.layers[-1].out_features == 3
    assert LIIF(128, cell_decode=False).layers[0].in_features == 130


def test_errors_say_what_came():
    liif, f = build(), features(5, 4)
    coords, cells = torch.zeros(1, 6, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 4\)"):
        liif.query(f[:, :4], coords, cells)
    with pytest.raises(ValueError, match=r"\(6, 2\)"):
        liif.query(f, coords[0], cells)
    with pytest.raises(ValueError, match="coords"):
        liif.query(f, coords.expand(2, -1, -1), cells)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        liif.query(f, coords, cells[0])
    with pytest.raises(ValueError, match="size"):
        liif.render(f, (0, 4))
    with pytest.raises(ValueError, match="window"):
        liif.render(f, (4, 4), (2, 2, 3, 3))


@pytest.mark.parametrize(("ensemble", "side"), [(False, 4), (True, 1)])
def test_half_precision_is_finite(ensemble, side):
    """At a latent pixel's centre the areas that weight its answers, or would, are 0."""
    torch.manual_seed(0)
    head = LIIF(4, (8,), local_ensemble=ensemble).half()
    out = head.render(torch.randn(1, 4, side, 4).half(), (side, 4))
    assert out.isfinite().all() and out.dtype == torch.float16
