"""The transformers: nothing at first, any size, positions as offsets, and light."""

import dataclasses
import itertools

import pytest
import torch

from arbscale import presets
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset
from arbscale.transformer import (
    LatentTransformer,
    TokenBlock,
    TransformerDenoiser,
    merge_positions,
    rotary_angles,
    rotate,
    spread_tokens,
)
from arbscale.unet import UNet

STEPS = torch.tensor([3, 800])
SIZES = [(8, 8), (7, 5), (6, 9), (1, 1), (1, 9), (5, 1), (3, 14)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(net: torch.nn.Module) -> torch.nn.Module:
    """Replace the zeros that training starts from."""
    torch.manual_seed(1)
    for p in net.parameters():
        if not p.detach().abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    return net.eval()


def preset(kind: str, **changes) -> Preset:
    small = {"transformer_width": 64, "transformer_blocks": 3, "head_channels": 16}
    levels = {"unet_multipliers": (1,), "unet_attention_levels": ()}
    return dataclasses.replace(presets.tiny(), denoiser=kind, **{**small, **levels, **changes})


def build(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return presets.build_denoiser(preset(kind, **changes))


@pytest.fixture(scope="module", params=["unet_transformer", "transformer"])
def kind(request):
    return request.param


class Nothing(torch.nn.Module):
    """What is left where the transformer is taken out."""

    def forward(self, h, time):
        return h


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_before_it_has_learned_the_network_is_the_one_without_it(size):
    transformer = LatentTransformer(64, 256, width=64, blocks=2, merge=2, head_channels=16)
    whole = UNet(3, multipliers=(1,), blocks=1, attention_levels=(), middle=lambda *_: transformer)
    without = UNet(3, multipliers=(1,), blocks=1, attention_levels=(), middle=lambda *_: Nothing())
    awake(without)
    whole.load_state_dict(without.state_dict(), strict=False)
    z = noise(2, 3, *size)
    assert torch.equal(whole(z, STEPS), without(z, STEPS))
    torch.nn.init.normal_(transformer.out.weight, std=0.05)
    assert (whole(z, STEPS) - without(z, STEPS)).abs().max() > 1e-4


@torch.no_grad()
def test_the_transformer_alone_starts_at_zero():
    assert not build("transformer")(noise(2, 3, 5, 4), STEPS).any()


@pytest.mark.slow
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_any_size(kind, size, merge):
    eps = awake(build(kind, merge=merge))(noise(2, 3, *size), STEPS)
    assert eps.shape == (2, 3, *size)
    assert eps.isfinite().all() and eps.std() > 0


@torch.no_grad()
def test_pictures_of_a_batch_are_independent(kind):
    net, z = awake(build(kind)), noise(2, 3, 5, 6)
    alone = torch.cat([net(z[i : i + 1], STEPS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(z, STEPS), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_noise_depends_on_the_step(kind):
    net, z = awake(build(kind)), noise(1, 3, 8, 8)
    a, b = (net(z, torch.tensor([t])) for t in (0, 990))
    assert (a - b).abs().max() > 1e-2


@torch.no_grad()
def test_time_modulates_the_tokens():
    layer = awake(LatentTransformer(64, 32, width=64, blocks=1, merge=2, head_channels=16))
    x = noise(1, 64, 4, 4)
    out = [layer(x, noise(1, 32, seed=seed)) for seed in (1, 2)]
    assert (out[0] - out[1]).abs().max() > 1e-2


@torch.no_grad()
def test_every_position_hears_of_every_other():
    net, z = awake(build("transformer")), noise(1, 3, 24, 24)
    other = z.clone()
    other[..., 0, 0] += 3
    assert (net(z, STEPS[:1]) - net(other, STEPS[:1]))[..., -1, -1].abs().max() > 1e-5


def test_gradients_reach_every_weight(kind):
    """Zeros at the start hide what is behind them: output, then blocks, then their inside."""
    net = build(kind)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (net(noise(2, 3, 5, 4), STEPS) - noise(2, 3, 5, 4, seed=1)).square().mean().backward()
        optimiser.step()
    assert not [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0]


def test_recomputed_activations_give_the_same_gradients(kind):
    net, z = awake(build(kind)), noise(2, 3, 4, 6)
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(z, STEPS).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


def test_condition(kind):
    net = awake(build(kind, low_size=8))
    z = noise(2, 3, 6, 5)
    with torch.no_grad():
        eps = [net(z, STEPS, noise(2, 3, 6, 5, seed=seed)) for seed in (1, 2)]
    assert (eps[0] - eps[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="3 channels"):
        net(z, STEPS)
    with pytest.raises(ValueError, match="condition"):
        build(kind)(z, STEPS, z)


@torch.no_grad()
def test_mixed_precision(kind):
    net, z = awake(build(kind)), noise(2, 3, 24, 6)
    exact = net(z, STEPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = net(z, STEPS)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("merge", [1, 2, 4])
def test_spreading_undoes_merging(size, merge):
    x = noise(2, 3, *size)
    tokens, grid = merge_positions(x, merge)
    assert grid == tuple(-(-n // merge) for n in size)
    assert tokens.shape == (2, grid[0] * grid[1], 3 * merge**2)
    assert torch.equal(spread_tokens(tokens, grid, merge, size), x)


def test_a_token_holds_a_square_of_neighbours():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    tokens, grid = merge_positions(x, 2)
    assert grid == (2, 3)
    assert tokens[0, 4].tolist() == x[0, 0, 2:4, 2:4].flatten().tolist()


@torch.no_grad()
def test_attention_agrees_with_loops():
    """Each pair of numbers is a complex one, turned by row and column; scores are real parts."""
    torch.manual_seed(0)
    width, head, grid = 32, 16, (2, 3)
    block, x = TokenBlock(width, head), noise(1, 6, width)
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    turns = [100.0 ** -(i / 4) for i in range(4)]  # radians a token
    q, k, v = block.qkv(x)[0].chunk(3, dim=1)  # (6, 32) each
    mixed = torch.zeros(6, width)
    for start in range(0, width, head):
        part = slice(start, start + head)
        a, b = (torch.complex(y[:, part][:, :8], y[:, part][:, 8:]) for y in (q, k))
        for m, (row, column) in enumerate(places):
            scores = []
            for n, (other_row, other_column) in enumerate(places):
                by = [(row - other_row) * f for f in turns]
                by += [(column - other_column) * f for f in turns]
                turn = torch.polar(torch.ones(8), torch.tensor(by))
                scores.append((a[m] * b[n].conj() * turn).real.sum() / head**0.5)
            for weight, value in zip(torch.stack(scores).softmax(0), v[:, part], strict=True):
                mixed[m, part] += weight * value
    ours = block._attend(x, rotary_angles(grid, head))
    torch.testing.assert_close(ours[0], block.out(mixed), atol=1e-5, rtol=1e-5)


def test_scores_know_the_offset_alone():
    q, k = noise(16), noise(16, seed=1)
    angles = rotary_angles((6, 7), 16).unflatten(0, (6, 7))

    def score(a, b):
        return (rotate(q, angles[a]) * rotate(k, angles[b])).sum().item()

    for row, column in itertools.product(range(4), range(4)):
        assert score((row, column), (row + 2, column + 3)) == pytest.approx(
            score((0, 0), (2, 3)), abs=1e-4
        )
    offsets = [(0, 0), (0, 1), (1, 0), (2, 3), (3, 2)]
    scores = [round(score((0, 0), offset), 3) for offset in offsets]
    assert len(set(scores)) == len(offsets)
    assert rotate(q, angles[5, 6]).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


@torch.no_grad()
def test_the_transformer_alone_knows_its_place():
    """The same content in another corner is another token: the ground is not the sky."""
    net = awake(build("transformer"))
    eps = net(torch.zeros(1, 3, 6, 6), STEPS[:1])
    assert (eps[..., 0, 0] - eps[..., 4, 4]).abs().max() > 1e-3


def test_saved_and_loaded_with_its_preset(kind, tmp_path):
    model = ArbitraryScaleModel(preset(kind, merge=3), scale_factor=2.0)
    awake(model.denoiser)
    model.save(tmp_path)
    loaded = ArbitraryScaleModel.load(tmp_path)
    assert loaded.preset == model.preset
    assert type(loaded.denoiser) is type(model.denoiser)
    assert torch.equal(loaded.generate(1, 20, steps=2), model.generate(1, 20, steps=2))


def test_without_being_asked_for_there_is_none():
    assert presets.tiny().denoiser == "unet"
    assert type(presets.build_denoiser(presets.tiny())) is UNet


def test_light():
    """A block has no more weights than a plain one of its width, time included but once."""
    for width in (64, 128, 192):
        block = sum(p.numel() for p in TokenBlock(width, 32).parameters())
        assert block <= 12 * width**2 + 20 * width
        tokens = LatentTransformer(64, 256, width, blocks=3, merge=2, head_channels=32)
        rest = sum(p.numel() for p in tokens.parameters()) - 3 * block
        assert rest <= (2 * 4 * 64 + 6 * 256) * width + 20 * width + 1000
    net = TransformerDenoiser(4, width=128, blocks=6)
    assert sum(p.numel() for p in net.parameters()) <= 6 * 12 * 128**2 + 15 * 128**2


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="unet_transformer"):
        preset("unet_transformers")
    with pytest.raises(ValueError, match="merge.*0"):
        preset("transformer", merge=0)
    with pytest.raises(ValueError, match="64 and 24"):
        build("transformer", head_channels=24)
