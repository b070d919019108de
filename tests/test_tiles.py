"""Tiles cover the picture, blend to one, and the noise knows nothing of them."""

import pytest
import torch
import torch.nn.functional as F

from arbscale import presets
from arbscale import tiles as tiles_module
from arbscale.coords import cell, grid, scaled_size
from arbscale.samplers import NOISE_BLOCK, noise_field
from arbscale.tiles import (
    Tile,
    back_project,
    bands,
    blend,
    paint,
    paste,
    tiles,
)

COVERS = [
    # input, tile, overlap
    ((5, 7), 32, 8),
    ((32, 32), 32, 8),
    ((33, 65), 32, 8),
    ((100, 31), 32, 0),
    ((1, 90), 16, 4),
    ((47, 50), 9, 3),
    ((3, 2), 1, 0),
    ((64, 200), 48, 12),
]


@pytest.mark.parametrize(("size", "side", "overlap"), COVERS, ids=str)
def test_tiles_cover_the_input(size, side, overlap):
    covered = torch.zeros(size, dtype=torch.int)
    for tile in tiles(size, side, overlap):
        assert 0 < tile.bottom - tile.top <= side and 0 < tile.right - tile.left <= side
        # The overlap is what has been covered above and to the left.
        before = covered[tile.top : tile.bottom, tile.left : tile.right] > 0
        assert before[: tile.over_top].all() and before[:, : tile.over_left].all()
        assert not before[tile.over_top :, tile.over_left :].any()
        assert tile.over_top >= overlap or tile.top == 0
        assert tile.over_left >= overlap or tile.left == 0
        covered[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert (covered > 0).all()


def test_a_small_picture_is_one_tile():
    assert list(tiles((5, 32), 32, 8)) == [Tile(0, 0, 5, 32, 0, 0, 0)]


def test_tiles_are_evenly_spread():
    row = list(tiles((8, 90), 32, 8))
    assert len(row) == 4 and {tile.right - tile.left for tile in row} == {29}  # (90 + 3 * 8) / 4
    assert row[0].left == 0 and row[-1].right == 90
    assert {tile.over_left for tile in row[1:]} <= {8, 9}


@pytest.mark.parametrize(("side", "overlap"), [(8, 8), (8, 9), (8, -1), (0, 0), (-4, 0)])
def test_an_impossible_overlap_is_refused(side, overlap):
    with pytest.raises(ValueError, match="tile"):
        list(tiles((20, 20), side, overlap))


# Points -------------------------------------------------------------------------------------------


def test_the_only_tile_has_the_pictures_own_points():
    (tile,) = tiles((6, 9), 32, 8)
    window, y, x, cells = tile.axes((6, 9), (20, 33))
    coords = torch.cartesian_prod(y, x)
    assert window == (0, 0, 20, 33)
    torch.testing.assert_close(coords, grid((20, 33)).view(-1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(cells.float(), cell((20, 33)))


@pytest.mark.parametrize("size", [(100, 61), (201, 333), (37, 20), (9, 200), (4, 3)], ids=str)
def test_points_are_where_they_would_be_without_tiles(size):
    """A tile's own coordinates, mapped back to the picture, are the picture's pixel centres."""
    low = (54, 33)
    whole = grid(size)
    seen = torch.zeros(size, dtype=torch.int)
    for tile in tiles(low, 16, 4):
        (top, left, height, width), y, x, cells = tile.axes(low, size)
        coords = torch.cartesian_prod(y, x)
        assert coords.shape == (height * width, 2)
        assert coords.numel() == 0 or coords.abs().max() <= 1
        start = torch.tensor([tile.top, tile.left])
        side = torch.tensor([tile.bottom - tile.top, tile.right - tile.left])
        total = torch.tensor(low)
        back = (start + (coords + 1) / 2 * side) / total * 2 - 1
        expected = whole[top : top + height, left : left + width].reshape(-1, 2)
        torch.testing.assert_close(back, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close((cells * side / total).float(), cell(size))
        seen[top : top + height, left : left + width] += 1
    assert (seen > 0).all(), "every output pixel lies in a tile"


def test_a_tile_may_hold_no_pixel():
    """Reduced twenty times, most tiles fall between two pixel centres."""
    empty = 0
    for tile in tiles((60, 60), 4, 1):
        window, y, x, _ = tile.axes((60, 60), (3, 3))
        empty += len(y) * len(x) == 0
        paste(torch.zeros(3, 3, 3), torch.zeros(3, *window[2:]), window, y, x, tile)
    assert empty > 100


# Pasting ------------------------------------------------------------------------------------------

SIZES = [(5, 7), (54, 33), (40, 81)]
OUTPUTS = [(54, 33), (200, 150), (31, 97), (13, 9), (5, 4), (1, 1), (77, 3)]


@pytest.mark.parametrize("out_size", OUTPUTS, ids=str)
@pytest.mark.parametrize("low", SIZES, ids=str)
@pytest.mark.parametrize(("side", "overlap"), [(16, 4), (16, 0), (9, 5), (32, 8)])
def test_constants_stay_constant(low, out_size, side, overlap):
    """Whatever `out` held before (here: not a number) is painted over, and weights sum to one."""
    out = torch.full((3, *out_size), float("nan"))
    for tile in tiles(low, side, overlap):
        window, y, x, _ = tile.axes(low, out_size)
        paste(out, torch.full((3, *window[2:]), 0.3), window, y, x, tile)
    torch.testing.assert_close(out, torch.full_like(out, 0.3))


def test_the_overlap_fades_in():
    out = torch.zeros(3, 4, 12)
    first, second = tiles((4, 12), 8, 4)
    for tile, value in ((first, 0.0), (second, 1.0)):
        window, y, x, _ = tile.axes((4, 12), (4, 12))
        paste(out, torch.full((3, 4, 8), value), window, y, x, tile)
    row = out[0, 0]
    assert row[:4].tolist() == [0] * 4 and row[8:].tolist() == [1] * 4
    assert row[4:8].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])


def test_four_tiles_meet_in_their_bilinear_blend():
    """Weights are products of one along y and one along x, wherever the tile is in the order."""
    spans = list(tiles((36, 36), 24, 12))
    ramp = (torch.arange(24) + 0.5) / 24
    rising = torch.cat([torch.zeros(24), ramp, torch.ones(24)])  # of the second tile of an axis
    along = [1 - rising, rising]
    for k, shown in enumerate(spans):
        out = torch.full((3, 72, 72), float("nan"))
        for tile in spans:
            window, y, x, _ = tile.axes((36, 36), (72, 72))
            paste(out, torch.full((3, *window[2:]), float(tile == shown)), window, y, x, tile)
        expected = along[k // 2][:, None] * along[k % 2]
        torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=0)


# Blending -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side", "overlap"), COVERS, ids=str)
@pytest.mark.parametrize("zoom", [1, 2, 0.5], ids=str)
def test_parts_of_one_tensor_blend_to_it(size, side, overlap, zoom):
    """Whatever the tiles, a latent of a fraction of the input's size too."""
    places = [tile.latent(zoom) for tile in tiles(size, side, overlap)]
    height, width = (max(place[axis].stop for place in places) for axis in (1, 2))
    assert abs(height - size[0] * zoom) <= 1 and abs(width - size[1] * zoom) <= 1
    z = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blend(((place, z[place]) for place in places), z), z)


def test_a_part_counts_less_towards_its_border():
    left, right = (tile.latent(1) for tile in tiles((1, 12), 8, 4))
    like = torch.zeros(1, 1, 1, 12)
    out = blend(((p, torch.full((1, 1, 1, 8), v)) for p, v in ((left, 0.0), (right, 1.0))), like)
    assert out.flatten()[:4].tolist() == [0] * 4 and out.flatten()[8:].tolist() == [1] * 4
    shares = [0.5 / 4, 1.5 / 4, 2.5 / 4, 3.5 / 4]  # of 4: the two distances from the borders
    assert out.flatten()[4:8].tolist() == pytest.approx(shares)


# Noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", [(0, 0), (5, 17), (31, 32), (64, 3), (1000, 70)], ids=str)
def test_a_window_of_noise_does_not_depend_on_the_cut(corner):
    top, left = corner
    whole = noise_field(7, 4, corner, (70, 45))
    assert whole.shape == (4, 70, 45)
    for dy, dx, height, width in [(0, 0, 1, 1), (3, 40, 60, 5), (69, 0, 1, 45), (20, 20, 33, 2)]:
        part = noise_field(7, 4, (top + dy, left + dx), (height, width))
        assert torch.equal(part, whole[:, dy : dy + height, dx : dx + width])


def test_noise_is_standard_normal_and_fresh_everywhere():
    field = noise_field(0, 4, (0, 0), (256, 256))
    assert field.mean().abs() < 0.01
    assert field.std().item() == pytest.approx(1, abs=0.01)
    assert (field.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=0.0006)
    n = NOISE_BLOCK
    blocks = field.unfold(1, n, n).unfold(2, n, n).reshape(4, -1, n * n)  # (4, blocks, n*n)
    correlation = torch.corrcoef(blocks.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.1


def test_noise_is_named_by_its_seed():
    a, b = (noise_field(seed, 3, (0, 0), (40, 40)) for seed in (1, 2))
    assert torch.equal(a, noise_field(1, 3, (0, 0), (40, 40)))
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.05
    assert noise_field(-5, 3, (0, 0), (4, 4)).isfinite().all()


# Back-projection ----------------------------------------------------------------------------------


def corrected(rgb, low):
    """Write one round of back-projection as its definition says."""
    reduced = F.interpolate(rgb[None], low.shape[-2:], mode="bicubic", antialias=True)
    error = F.interpolate(low[None] - reduced, rgb.shape[-2:], mode="bicubic", antialias=True)
    return rgb + error[0]


def test_back_projection_has_two_rounds():
    generator = torch.Generator().manual_seed(0)
    rgb, low = (torch.rand(3, n, n, generator=generator) for n in (37, 10))
    torch.testing.assert_close(back_project(rgb, low), corrected(corrected(rgb, low), low))
    torch.testing.assert_close(back_project(rgb, low, rounds=1), corrected(rgb, low))
    assert (back_project(rgb, low) - corrected(rgb, low)).abs().max() > 0.02


def test_back_projection_leaves_what_is_smaller_than_its_input():
    rgb = torch.rand(3, 9, 30)
    assert torch.equal(back_project(rgb, torch.zeros(3, 10, 10)), rgb)


class Flat(torch.nn.Module):
    """A first stage that paints each latent's first three channels, by nearest neighbour."""

    features = torch.nn.Identity()

    @property
    def liif(self):
        return self

    def query_grid(self, z, y, x, cells):
        at = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # (1, H, W, 2)
        return F.grid_sample(z, at, padding_mode="border", align_corners=False)[:, :3]


def noisy_tiles(low, side):
    """Return tiles of `side`, with the noisy pixels of `low` as latents."""
    generator = torch.Generator().manual_seed(0)
    z = low + 0.3 * torch.randn(low.shape, generator=generator)
    return [(span, span.cut(z)[None]) for span in tiles(low.shape[-2:], side, side // 4)]


def painted(low, size, side, dtype=torch.float32):
    return paint(Flat(), low, size, noisy_tiles(low, side), dtype)


def photograph(height, width):
    """Return pixels between -0.8 and 0.8 that differ from their neighbours."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


@pytest.mark.parametrize("scale", [1.5, 2, 2.3, 2.5, 3.7, 4])
def test_tiles_agree_with_the_input_as_one_tile_does(scale):
    """Reduced again, the image is its input: tiles' borders need not be those of output pixels."""
    low = photograph(60, 45)
    size = scaled_size((60, 45), scale)

    def error(side):
        again = F.interpolate(
            painted(low, size, side)[None], (60, 45), mode="bicubic", antialias=True
        )
        return (again[0] - low).square().mean().sqrt().item() * 127.5

    assert error(16) == pytest.approx(error(64), rel=0.2)


@pytest.mark.parametrize("low_size", [(60, 45), (5, 33), (40, 7)], ids=str)
@pytest.mark.parametrize("scale", [1, 1.3, 2.5, 3.7, 8])
def test_bands_are_corrected_as_the_whole_is(low_size, scale, monkeypatch):
    low, size = photograph(*low_size), scaled_size(low_size, scale)
    for side in (9, 16, 64):
        found = painted(low, size, side)
        with monkeypatch.context() as context:
            context.setattr("arbscale.tiles._back_projected", lambda found, *_: found)
            bare_of = lambda x, low, high: x if low == -1 else torch.clamp(x, low, high)  # noqa: E731
            context.setattr(torch.Tensor, "clamp", bare_of)
            bare = painted(low, size, side)
        expected = back_project(bare, low).clamp(-1, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(30, 20), (45, 90), (61, 7), (1, 1)], ids=str)
def test_what_is_smaller_than_the_input_is_the_average_of_a_larger_image(size):
    low = photograph(60, 45)
    n = {(30, 20): 3, (45, 90): 2, (61, 7): 7, (1, 1): 60}[size]
    larger = painted(low, (n * size[0], n * size[1]), 16)
    expected = F.avg_pool2d(larger[None], n)[0]
    torch.testing.assert_close(painted(low, size, 16), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.6, 1.5, 3.7])
@pytest.mark.parametrize("side", [9, 16, 64])
def test_bands_of_any_height_from_any_row_are_the_same(scale, side, monkeypatch):
    """Of 37 rows, tiles of 16 are three: a row of the image may lie in all of them."""
    low, size = photograph(37, 20), scaled_size((37, 20), scale)
    whole = painted(low, size, side)
    monkeypatch.setattr(tiles_module, "BAND", 3 * size[1])
    seen = []
    first_stage = Flat()
    first_stage.features = lambda z: seen.append(z) or z
    for row in (0, 1, size[0] // 2, size[0] - 1):
        seen.clear()
        found = list(bands(first_stage, low, size, noisy_tiles(low, side), row=row))
        torch.testing.assert_close(torch.cat(found, dim=1), whole[:, row:], atol=1e-5, rtol=0)
        assert max(band.shape[1] for band in found) <= 3  # the last ones, too
    assert len(seen) <= 6 or side == 9  # what lies above is not decoded


def test_what_paint_holds_does_not_grow_with_the_image(monkeypatch):
    """Beyond the output, rows of a few tiles."""
    heights = []
    original = tiles_module._rows
    monkeypatch.setattr(
        tiles_module, "_rows", lambda x, *rest: heights.append(x.shape[1]) or original(x, *rest)
    )
    for rows in (100, 300):
        painted(photograph(rows, 20), (rows * 3, 60), 16)
        assert 16 * 3 < max(heights) < 45 * 3


def test_bytes():
    low = torch.full((3, 20, 20), 0.5)
    flat = [(tile, torch.full((1, 3, 4, 4), 0.5)) for tile in tiles((20, 20), 8, 2)]
    out = paint(Flat(), low, (50, 50), flat, torch.uint8)
    assert out.dtype == torch.uint8
    assert out.unique().tolist() == [191]  # (0.5 + 1) * 127.5 = 191.25
    low = photograph(20, 20)
    as_bytes, floats = (painted(low, (50, 50), 8, dtype) for dtype in (torch.uint8, torch.float32))
    assert torch.equal(as_bytes, ((floats + 1) * 127.5).round().byte())


def test_paint_stays_on_the_device_of_its_input():
    """Whatever the device of the first stage is."""
    spans = list(tiles((20, 20), 8, 2))
    low = torch.zeros(3, 20, 20, device="meta")
    out = paint(Flat(), low, (50, 50), [(tile, torch.zeros(1, 3, 4, 4)) for tile in spans])
    assert out.device == low.device


@torch.no_grad()
def test_paint_corrects_what_is_decoded_by_two_rounds():
    torch.manual_seed(0)
    first_stage = presets.build_first_stage(presets.tiny(8)).eval()
    low, z = torch.rand(3, 8, 8) - 0.5, torch.randn(1, 3, 16, 16)
    (tile,) = tiles((8, 8), 16, 4)
    decoded = first_stage.decode(z, (29, 29))[0]
    expected = corrected(corrected(decoded, low), low).clamp(-1, 1)
    painted = paint(first_stage, low, (29, 29), [(tile, z)])
    torch.testing.assert_close(painted, expected, atol=1e-5, rtol=1e-5)


def test_tiles_with_a_border_continue_the_image_by_its_outermost_pixels():
    image = torch.arange(1.0, 5 * 9 + 1).view(1, 5, 9)
    wider = torch.nn.functional.pad(image[None], (3,) * 4, mode="replicate")[0]
    out = torch.zeros_like(wider)
    for tile in tiles((5, 9), 8, 4, border=3):
        out[tile.latent(1)] = tile.cut(image)
    assert torch.equal(out, wider)


@pytest.mark.parametrize("size", [(5, 9), (13, 22)])
def test_a_border_moves_no_pixel(size):
    (plain,) = tiles((5, 9), 20, 4)
    (wider,) = tiles((5, 9), 20, 4, border=3)
    (window, y, x, cells), found = plain.axes((5, 9), size), wider.axes((5, 9), size)
    assert found[0] == window
    torch.testing.assert_close(found[1], y * 5 / 11)
    torch.testing.assert_close(found[2], x * 9 / 15)
    torch.testing.assert_close(found[3], cells * torch.tensor([5 / 11, 9 / 15]))
