"""The four stages: each learns, freezes what it should, and repeats itself from a seed."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from arbscale import presets, training
from arbscale.coords import grid
from arbscale.diffusion import alignment_loss
from arbscale.model import ArbitraryScaleModel
from arbscale.training import (
    PhotoBatch,
    finetune_alignment,
    photo_source,
    scene_source,
    train_autoencoder,
    train_decoder,
    train_diffusion,
    train_first_stage,
)


def shrunken(low_size: int | None = None, **changes) -> presets.Preset:
    numbers = {
        "image_size": 16,
        "target_sizes": (8, 24),
        "hidden": (32,),
        "first_stage_batch": 4,
        "diffusion_batch": 8,
    }
    return dataclasses.replace(presets.tiny(low_size), **(numbers | changes))


def build(low_size: int | None = None, **changes) -> ArbitraryScaleModel:
    torch.manual_seed(0)
    return ArbitraryScaleModel(shrunken(low_size, **changes))


SOURCE = scene_source(count=200)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def falls(losses: list[float], share: float) -> bool:
    fifth = len(losses) // 5
    return sum(losses[-fifth:]) < share * sum(losses[:fifth])


# Sources ------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["scenes", "photos"])
def batch(request):
    if request.param == "scenes":
        return SOURCE(3, seeded())
    return PhotoBatch(torch.rand(3, 3, 20, 20, generator=seeded()) * 2 - 1)


@pytest.mark.parametrize("size", [8, 13, 31])
def test_colors_are_the_pixels_of_the_image(batch, size):
    image = batch.image(size)
    assert image.shape == (3, 3, size, size) and image.abs().max() <= 1
    picks = torch.randint(size * size, (3, 40), generator=seeded())
    colors = batch.colors(size, grid((size, size)).view(-1, 2)[picks])
    expected = image.flatten(2).mT.gather(1, picks[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(colors, expected, atol=1e-4, rtol=0)


def test_scene_source_is_seeded():
    one, again, other = (SOURCE(2, seeded(s)).image(8) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_photo_source():
    """Crops of several sides, flipped half of the time, from photographs larger and smaller."""
    ramp = torch.linspace(-1, 1, 40).expand(3, 30, 40)
    source = photo_source([ramp, ramp[:, :9, :9]], shrunken())
    sides, falling = set(), 0
    generator = seeded()
    for _ in range(12):
        crops = source(4, generator).crops
        assert crops.shape[:2] == (4, 3) and crops.shape[2] == crops.shape[3]
        sides.add(crops.shape[-1])
        falling += int((crops[:, 0, 0, -1] < crops[:, 0, 0, 0]).sum())
    assert 16 <= min(sides) and max(sides) <= 24 and len(sides) > 3
    assert 10 < falling < 38
    first = [source(4, seeded(3)).crops for _ in range(2)]
    assert torch.equal(*first)


# Each stage learns --------------------------------------------------------------------------------


def test_autoencoder_learns():
    torch.manual_seed(0)
    preset = shrunken()
    encoder, decoder = presets.build_encoder(preset), presets.build_decoder(preset)
    losses = train_autoencoder(encoder, decoder, SOURCE, preset, steps=40)
    assert len(losses) == 40 and falls(losses, 0.75)


def test_decoder_learns_and_the_encoder_is_frozen():
    model = build()
    before, other = state(model.first_stage.encoder), state(model.first_stage.liif)
    losses = train_decoder(model.first_stage, SOURCE, model.preset, steps=40)
    assert len(losses) == 40 and falls(losses, 0.85)
    assert same(before, state(model.first_stage.encoder))
    assert not same(other, state(model.first_stage.liif))


def test_first_stage_is_both():
    model = build()
    before = state(model.first_stage)
    losses = train_first_stage(model, SOURCE, autoencoder_steps=2, decoder_steps=3)
    assert len(losses) == 3
    after = state(model.first_stage)
    for part in ("encoder", "decoder", "liif"):
        assert not same({k: v for k, v in before.items() if k.startswith(part)}, after)


@pytest.mark.parametrize("joint", [True, False])
def test_the_encoder_goes_on_learning_on_request(joint):
    model = build()
    before = state(model.first_stage)
    losses = train_first_stage(model, SOURCE, 0, 3, joint=joint)
    assert len(losses) == 3
    after = state(model.first_stage)
    for part, moves in (("encoder", joint), ("decoder", True), ("liif", True)):
        still = same({k: v for k, v in before.items() if k.startswith(part)}, after)
        assert still != moves, part


@pytest.mark.parametrize("low_size", [None, 4])
def test_diffusion_learns_and_the_first_stage_is_frozen(low_size):
    model = build(low_size)
    before = state(model.first_stage)
    losses = train_diffusion(model, SOURCE, steps=50, pool=64)
    assert len(losses) == 50 and falls(losses, 0.85)
    assert same(before, state(model.first_stage))
    assert not any(p.requires_grad for p in model.first_stage.parameters())


def alignment_error(model: ArbitraryScaleModel) -> float:
    """The alignment loss on fixed pictures, steps and noise."""
    image = SOURCE(8, seeded(7)).image(16)
    t = torch.arange(60, 960, 120)
    with torch.no_grad():
        z0 = model.first_stage.encode(image) * model.scale_factor
        terms = alignment_loss(
            model.denoise(),
            lambda z: model.first_stage.decode(z / model.scale_factor, 16),
            z0,
            image,
            t,
            torch.randn(z0.shape, generator=seeded(8)),
            model.schedule,
        )
    return sum(term.mean().item() for term in terms)


def test_alignment_learns_and_the_decoder_is_frozen():
    model = build(alignment_lr=1e-3)
    train_decoder(model.first_stage, SOURCE, model.preset, steps=10)
    train_diffusion(model, SOURCE, steps=10, pool=64)
    before, error = state(model.first_stage), alignment_error(model)
    losses = finetune_alignment(model, SOURCE, steps=25, max_weight=5.0)
    assert len(losses) == 25
    assert alignment_error(model) < 0.9 * error
    assert same(before, state(model.first_stage))


def test_alignment_of_a_super_resolution_model():
    model = build(4)
    before = state(model.denoiser)
    assert len(finetune_alignment(model, SOURCE, steps=2)) == 2
    assert not same(before, state(model.denoiser))


def test_a_gaussian_posterior_through_all_stages():
    model = build(4, posterior=True)
    train_first_stage(model, SOURCE, 2, 2)
    train_diffusion(model, SOURCE, 2, pool=16)
    finetune_alignment(model, SOURCE, 2)
    z0 = model.first_stage.encode(SOURCE(2, seeded()).image(16))
    assert z0.shape == (2, 3, 8, 8)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_posterior_is_sampled_while_pre_training():
    """So that two runs that differ in the noise alone end differently."""
    preset, ends = shrunken(posterior=True), []
    fixed = SOURCE(4, seeded())
    for seed in (0, 1):
        torch.manual_seed(0)
        encoder, decoder = presets.build_encoder(preset), presets.build_decoder(preset)
        ends.append(train_autoencoder(encoder, decoder, lambda n, g: fixed, preset, 2, seed)[-1])
    assert ends[0] != ends[1]


# Repetition ---------------------------------------------------------------------------------------


def all_stages(seed: int) -> ArbitraryScaleModel:
    model = build(4)
    train_first_stage(model, SOURCE, 2, 2, seed)
    train_diffusion(model, SOURCE, 2, seed, pool=16)
    finetune_alignment(model, SOURCE, 2, seed)
    return model


def test_the_same_seed_gives_the_same_weights():
    one, again, other = all_stages(0), all_stages(0), all_stages(1)
    assert same(state(one), state(again)) and one.scale_factor == again.scale_factor
    assert not same(state(one.denoiser), state(other.denoiser))


def test_no_steps_change_nothing():
    model = build()
    before = state(model)
    assert train_first_stage(model, SOURCE, 0, 0) == []
    assert train_diffusion(model, SOURCE, 0, pool=8) == []
    assert finetune_alignment(model, SOURCE, 0) == []
    assert same(before, state(model))


def test_a_stage_can_be_trained_again_after_a_later_one():
    """As when a notebook's cell is run twice: the part it trains moves, whatever was frozen."""
    model = build()
    train_first_stage(model, SOURCE, 1, 1)
    train_diffusion(model, SOURCE, 1, pool=8)
    before = state(model.first_stage)
    train_first_stage(model, SOURCE, 2, 2)
    after = state(model.first_stage)
    for part in ("encoder", "decoder", "liif"):
        assert not same({k: v for k, v in before.items() if k.startswith(part)}, after), part


# Averages and scale -------------------------------------------------------------------------------


def test_the_average_of_the_weights_by_hand():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    twin, history = copy.deepcopy(net), []

    def loss_of(network):
        def loss(generator):
            x = torch.randn(8, 3, generator=generator)
            return (network(x) - x.sum(1, keepdim=True)).square().mean()

        return loss

    def record(step):
        history.append(twin.weight.detach().clone())

    expected = net.weight.detach().clone()
    losses = training._optimise(loss_of(twin), twin.parameters(), 0.1, 12, 0, "twin", record)
    assert training._optimise_with_ema(net, loss_of(net), 0.1, 12, 0, "net") == losses
    for step, weight in enumerate(history):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(net.weight.detach(), expected)
    assert not torch.allclose(net.weight, twin.weight)


@pytest.mark.parametrize("low_size", [None, 4])
def test_the_scale_factor_makes_latents_of_unit_spread(low_size):
    model, drawn = build(low_size), []

    def source(n, generator):
        drawn.append(SOURCE(n, generator))
        return drawn[-1]

    train_diffusion(model, source, steps=0, pool=100)
    with torch.no_grad():
        z = torch.cat([model.first_stage.encode(b.image(16)) for b in drawn])
    assert len(z) >= 100
    assert model.scale_factor == pytest.approx(1 / z.std().item(), rel=1e-5)


def test_the_pool_holds_what_single_calls_give():
    """Latents and conditions, scaled."""
    model = build(4)
    fixed = SOURCE(8, seeded())
    z, condition = training._encode_pool(model, lambda n, g: fixed, 8, seed=0)
    image, z0, again = training._encode(model, fixed)
    assert image.shape == (8, 3, 16, 16)
    torch.testing.assert_close(z, z0)
    torch.testing.assert_close(condition, again)
    assert z.std().item() == pytest.approx(1, rel=1e-4)


# Errors -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training():
    model = build()
    broken = PhotoBatch(torch.full((4, 3, 16, 16), float("nan")))
    with pytest.raises(RuntimeError, match="decoder: the loss became nan at step 0; take a lower"):
        train_decoder(model.first_stage, lambda n, g: broken, model.preset, 3)
