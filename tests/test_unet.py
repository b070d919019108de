"""The denoiser: any size, each picture for itself, and awake to the step."""

import math

import pytest
import torch
import torch.nn.functional as F

from arbscale.unet import (
    Attention,
    ResidualBlock,
    UNet,
    attend,
    limit_attention,
    timestep_embedding,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(net: torch.nn.Module) -> torch.nn.Module:
    """Replace the zeros that training starts from."""
    torch.manual_seed(1)
    for p in net.parameters():
        if not p.detach().abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return awake(UNet(3, channels=64, multipliers=(1, 1, 2), blocks=1, attention_levels=(1,)))


STEPS = torch.tensor([3, 800])


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 5), (7, 2), (6, 13), (1, 9)], ids=str)
@torch.no_grad()
def test_any_size(unet, size):
    eps = unet(noise(2, 3, *size), STEPS)
    assert eps.shape == (2, 3, *size)
    assert eps.isfinite().all()


@torch.no_grad()
def test_pictures_of_a_batch_are_independent(unet):
    z = noise(2, 3, 5, 6)
    alone = torch.cat([unet(z[i : i + 1], STEPS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(unet(z, STEPS), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_noise_depends_on_the_step(unet):
    z = noise(1, 3, 8, 8)
    a, b, c = (unet(z, torch.tensor([t])) for t in (0, 10, 990))
    assert (a - b).abs().max() > 1e-3
    assert (a - c).abs().max() > 1e-2


@torch.no_grad()
def test_one_channel_a_group_is_blind_to_the_step():
    """What time adds to a whole channel, its normalisation removes: hence the width of 64."""
    change = {}
    for channels in (32, 64):
        torch.manual_seed(0)
        block = awake(ResidualBlock(channels, channels, 16))
        x = noise(1, channels, 6, 6)
        out = [block(x, noise(1, 16, seed=seed)) for seed in (1, 2)]
        change[channels] = (out[0] - out[1]).abs().max().item()
    assert change[32] < 1e-4 < 1e-2 < change[64]


@torch.no_grad()
def test_training_starts_at_zero():
    assert not UNet(3, channels=64, multipliers=(1,), blocks=1)(noise(1, 3, 4, 4), STEPS[:1]).any()


@torch.no_grad()
def test_condition():
    torch.manual_seed(0)
    net = awake(UNet(3, condition_channels=4, channels=64, multipliers=(1, 1), blocks=1))
    z = noise(2, 3, 6, 6)
    eps = [net(z, STEPS, noise(2, 4, 6, 6, seed=seed)) for seed in (1, 2)]
    assert eps[0].shape == (2, 3, 6, 6)
    assert (eps[0] - eps[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="4 channels"):
        net(z, STEPS)


def test_no_condition_is_taken_unasked(unet):
    with pytest.raises(ValueError, match="condition"):
        unet(noise(2, 3, 4, 4), STEPS, noise(2, 3, 4, 4))


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    net = awake(UNet(3, channels=64, multipliers=(1, 1), blocks=1, attention_levels=(0, 1)))
    net(noise(2, 3, 5, 4), STEPS).square().sum().backward()
    assert not [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0]


def test_timestep_embedding_by_hand():
    e = timestep_embedding(torch.tensor([0, 7]), 6)
    assert e[0].tolist() == [1, 1, 1, 0, 0, 0]
    angles = [7 * 10_000 ** (-k / 3) for k in range(3)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert e[1].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_attention_by_hand():
    """Heads come one after the other in the projection, each as query, key, value."""
    torch.manual_seed(0)
    layer, x = awake(Attention(64, head_channels=32)), noise(1, 64, 2, 3)
    h = layer.qkv(layer.norm(x)[0].flatten(1).T)  # (6, 192)
    heads = []
    for start in (0, 96):
        q, k, v = h[:, start : start + 96].split(32, dim=1)
        heads.append(torch.softmax(q @ k.T / 32**0.5, dim=1) @ v)
    mixed = layer.out(torch.cat(heads, dim=1)).T.reshape(1, 64, 2, 3)
    torch.testing.assert_close(layer(x, None), x + mixed, atol=1e-5, rtol=1e-5)


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [6, 9, 2, 1])
@pytest.mark.parametrize("grid", [(20, 13), (5, 31), (7, 7), (1, 40)], ids=str)
def test_a_window_lies_around_each_position(grid, window):
    """Seen by queries that ask for nothing: the mean of what each position reads."""
    height, width = grid
    n = height * width
    q, v = torch.zeros(1, 1, n, 4), torch.eye(n)[None, None]
    seen = attend(q, q, v, grid, window)[0, 0].view(height, width, height, width) > 0
    sides = min(height, window), min(width, window)
    assert (seen.flatten(2).sum(-1) == sides[0] * sides[1]).all()
    for (i, j), reads in ((p, seen[p]) for p in [(0, 0), (height // 2, width // 3), (-1, -1)]):
        at = i % height, j % width
        for axis, m in enumerate(grid):
            lines = reads.any(1 - axis).nonzero().flatten()
            first, last = int(lines[0]), int(lines[-1])
            assert last - first + 1 == sides[axis] and first <= at[axis] <= last
            reach = window // 6 - 1  # a rectangle is two thirds of the window
            assert first == 0 or at[axis] - first >= reach
            assert last == m - 1 or last - at[axis] >= reach


def test_a_grid_inside_the_window_is_read_as_a_whole():
    q, k, v = (noise(2, 3, 30, 8, seed=i) for i in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for window in (None, 6):
        assert torch.equal(attend(q, k, v, (5, 6), window), expected)
    assert (attend(q, k, v, (5, 6), 5) - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_windows_are_differentiable():
    q, k, v = (noise(1, 1, 24, 4, seed=i).double().requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, (4, 6), 3), (q, k, v))


@torch.no_grad()
def test_a_limited_network_reads_no_farther(unet):
    """Its convolutions aside; and what fits into the windows is as it was."""
    limited = awake(UNet(3, channels=64, multipliers=(1, 1, 2), blocks=1, attention_levels=(1,)))
    limited.load_state_dict(unet.state_dict())
    limit_attention(limited, 16)
    windows = [m.window for m in limited.modules() if isinstance(m, Attention)]
    assert sorted(set(windows)) == [4, 8]  # at half and at a quarter of the latent's size
    small, wide = noise(2, 3, 16, 13), noise(2, 3, 8, 90)
    torch.testing.assert_close(limited(small, STEPS), unet(small, STEPS))
    assert (limited(wide, STEPS) - unet(wide, STEPS)).abs().max() > 1e-4


def test_small_grids_take_plain_products_that_agree_with_the_fused_ones(monkeypatch):
    given = [noise(2, 3, 16, 8, seed=i).requires_grad_() for i in range(3)]

    def trained():
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*given).float()
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    plain = trained()
    monkeypatch.setattr("arbscale.unet.PAIRS", 0)
    for a, b in zip(plain, trained(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    exact = F.scaled_dot_product_attention(*given)
    monkeypatch.undo()
    torch.testing.assert_close(attend(*given), exact)  # float32 stays as it is


def test_plain_products_hold_no_more_pairs_than_they_may(monkeypatch):
    fused, q = [], noise(2, 3, 16, 8)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: fused.append(1) or q)
    for most, calls in ((2 * 3 * 16 * 16, 0), (2 * 3 * 16 * 16 - 1, 1)):
        monkeypatch.setattr("arbscale.unet.PAIRS", most)
        with torch.autocast("cpu", torch.bfloat16):
            attend(q, q, q)
        assert len(fused) == calls


@pytest.mark.slow
def test_compiling_captures_the_whole_network(unet):
    """As GPUs want it: no break in the graph, and the same numbers; no compiler is needed here."""
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    z = noise(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, STEPS), unet(z, STEPS))
