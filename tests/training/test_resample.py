"""Latents as sampling leaves them, and the decoder's stage that learns on them."""

import dataclasses

import pytest
import torch

from arbscale import presets
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import UPSCALING
from arbscale.training import Run, photo_source, scene_source, train_first_stage
from arbscale.training.first_stage import DecoderStage
from arbscale.training.resample import Resample

SOURCE = scene_source(count=200)


def build(low_size: int | None = None) -> ArbitraryScaleModel:
    torch.manual_seed(0)
    small = {"image_size": 16, "target_sizes": (8, 24), "hidden": (32,), "first_stage_batch": 4}
    model = ArbitraryScaleModel(dataclasses.replace(presets.tiny(low_size), **small))
    model.scale_factor = 1.5
    return model


def shape(model: ArbitraryScaleModel) -> tuple[int, int, int]:
    return model.preset.latent_channels, model.preset.latent_size, model.preset.latent_size


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stage(model: ArbitraryScaleModel, odds: float) -> DecoderStage:
    return DecoderStage(model.first_stage, SOURCE, model.preset, True, Resample(model, odds))


@pytest.mark.parametrize("low_size", [None, 4])
def test_a_perfect_denoiser_gives_the_latents_back(monkeypatch, low_size):
    model = build(low_size)
    z, noise = torch.randn(2, 2, *shape(model), generator=seeded())
    low = None if low_size is None else torch.rand(2, 3, 4, 4, generator=seeded(1)) * 2 - 1
    truth = z * model.scale_factor if low is None else model.condition(low)

    def denoise(condition, dtype):
        def eps(z_t, t):
            a = model.schedule.at(t, z_t)
            return (z_t - a.sqrt() * truth) / (1 - a).sqrt()

        return eps

    monkeypatch.setattr(model, "denoise", denoise)
    given = Resample(model, 1.0)(z, noise, 400, low)
    torch.testing.assert_close(given * model.scale_factor, truth, atol=1e-4, rtol=1e-4)


def test_super_resolution_starts_where_upscale_does(monkeypatch):
    """`upscale` of one tile and Resample ask the denoiser the same."""
    model, asked = build(4), []
    low = torch.rand(3, 4, 4, generator=seeded(1)) * 2 - 1
    denoise = ArbitraryScaleModel.denoise

    def noted(self, *how):
        inner = denoise(self, *how)
        return lambda z, t: asked.append(int(t[0])) or inner(z, t)

    monkeypatch.setattr(ArbitraryScaleModel, "denoise", noted)
    model.upscale(low, scale=2)
    upscaled, asked[:] = [*asked], []
    resample, z = Resample(model, 1.0), torch.zeros(1, *shape(model))
    resample(z, z, resample.first(seeded()), low[None])
    assert asked == upscaled and len(asked) == UPSCALING.steps


def test_odds_are_the_share_of_steps():
    resample = Resample(build(), 0.25)
    drawn = [resample.first(seeded(i)) for i in range(400)]
    starts = [first for first in drawn if first is not None]
    assert 70 < len(starts) < 130
    assert min(starts) >= 2 and 200 < max(starts) < 250  # a quarter of 1,000 steps


def test_the_stage_renders_sampled_latents():
    model = build(4)
    always, never = stage(model, 1.0), stage(model, 0.0)
    drawn = always.draw(seeded(), slice(0, 4))
    plain = never.draw(seeded(), slice(0, 4))
    assert {"start", "first", "low"} <= drawn.keys() and "start" not in plain
    assert always(**drawn) != never(**plain)
    z = model.first_stage.encode(drawn["image"])
    sampled = always.resample(z, drawn["start"], int(drawn["first"]), drawn["low"])
    model.first_stage.encode = lambda image: sampled  # what the decoder must have seen
    never(**plain).backward()
    expected = [p.grad.clone() for p in model.first_stage.liif.parameters()]
    model.zero_grad()
    del model.first_stage.encode
    always(**drawn).backward()
    for p, grad in zip(model.first_stage.liif.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_parts_of_a_batch_are_parts_of_the_whole():
    one = stage(build(4), 1.0)
    whole = one.draw(seeded(), slice(0, 4))
    parts = [one.draw(seeded(), slice(i, i + 2)) for i in (0, 2)]
    for name in ("start", "low", "image"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole, resumed = build(), build()
    train_first_stage(whole, SOURCE, 0, 6, resampled=0.5)
    run, first, calls = Run(tmp_path, resume=True, save_every=3), Resample.first, []

    def interrupted(self, generator):
        calls.append(generator)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return first(self, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resample, "first", interrupted)
        train_first_stage(build(), SOURCE, 0, 6, run=run, resampled=0.5)
    train_first_stage(resumed, SOURCE, 0, 6, run=run, resampled=0.5)
    ends = whole.first_stage.state_dict(), resumed.first_stage.state_dict()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_another_share_is_another_run(tmp_path):
    train_first_stage(build(), SOURCE, 0, 2, run=Run(tmp_path), resampled=0.5)
    with pytest.raises(ValueError, match="resampled"):
        run = Run(tmp_path, resume=True)
        train_first_stage(build(), SOURCE, 0, 2, run=run, resampled=0.6)


def test_a_share_of_the_crops_is_flat():
    ramp = torch.linspace(-1, 1, 3 * 40 * 40).view(3, 40, 40)
    kept, preset = ramp.clone(), build().preset
    source = photo_source([ramp], dataclasses.replace(preset, flat=0.25))
    crops = source(400, seeded()).crops
    flat = crops.std(dim=(2, 3)).amax(dim=1) < 1e-6
    assert 60 < flat.sum() < 140 and torch.equal(ramp, kept)
    plain = photo_source([ramp], preset)(400, seeded()).crops
    assert torch.equal(crops[~flat], plain[~flat])
    means = plain.mean(dim=(2, 3), keepdim=True).expand_as(plain)
    torch.testing.assert_close(crops[flat], means[flat])
    assert source.identity != photo_source([ramp], preset).identity
