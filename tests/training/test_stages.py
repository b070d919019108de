"""The four stages: each learns, freezes what it should, and repeats itself from a seed."""

import copy
import dataclasses
import math
import os
import shutil
from unittest.mock import ANY

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from arbscale import presets
from arbscale.autoencoder import TinyEncoder
from arbscale.coords import grid
from arbscale.data import ImageFolder, resize, to_pil
from arbscale.diffusion import alignment_loss
from arbscale.metrics import lpips_is_there
from arbscale.model import ArbitraryScaleModel
from arbscale.training import (
    PhotoBatch,
    Run,
    denoiser,
    distil_encoder,
    finetune_alignment,
    first_stage,
    losses,
    photo_source,
    scene_source,
    train_autoencoder,
    train_decoder,
    train_diffusion,
    train_first_stage,
    whole_source,
)
from arbscale.training.processes import make_accelerator


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


def test_pictures_are_taken_whole():
    images = [torch.full((3, 20, 20), k / 10) for k in range(3)]
    with pytest.raises(ValueError, match="20 x 18"):
        whole_source([images[0][..., :18]])
    assert whole_source(images)(2, seeded()).largest == 20
    assert whole_source(images).identity == whole_source(list(images)).identity
    mixed = whole_source([*images, torch.zeros(3, 20, 22)])
    for draw in (lambda: mixed.pick([0, 6]), lambda: mixed(20, seeded())):
        with pytest.raises(ValueError, match="image 3 is 20 x 22, not 20 x 20"):
            draw()


def test_no_target_is_larger_than_the_pictures():
    preset, images = shrunken(target_sizes=(8, 64)), [torch.rand(3, 24, 24)] * 2
    decoding = presets.build_first_stage(preset)
    stage = first_stage.DecoderStage(decoding, whole_source(images), preset, False)
    cells = [stage.draw(seeded(k), slice(0, stage.batch))["cells"][0, 0] for k in range(40)]
    sizes = [round(2 / c.item()) for c in cells]
    assert max(sizes) <= 24 and len(set(sizes)) > 8


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_frozen_encoder_encodes_each_numbered_image_once(limit, monkeypatch):
    monkeypatch.setattr(first_stage, "REMEMBERED", limit)
    images = [torch.rand(3, 24, 24, generator=seeded(k)) for k in range(3)]
    preset = shrunken(target_sizes=(8, 24))
    decoding = presets.build_first_stage(preset)
    stage = first_stage.DecoderStage(decoding, whole_source(images), preset, True)
    encode, encoded = decoding.encode, []
    monkeypatch.setattr(decoding, "encode", lambda x: encoded.append(x) or encode(x))
    for k in range(8):
        drawn = stage.draw(seeded(k), slice(0, stage.batch))
        z = stage.latents(decoding.encode, drawn["image"], drawn["numbers"])
        torch.testing.assert_close(z, encode(drawn["image"]), atol=1e-5, rtol=1e-4)
    assert len(encoded) == (6 if limit else 8 * stage.batch)  # three images and their mirrors


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


@pytest.mark.slow
def test_autoencoder_learns():
    torch.manual_seed(0)
    preset = shrunken()
    encoder, decoder = presets.build_encoder(preset), presets.build_decoder(preset)
    losses = train_autoencoder(encoder, decoder, SOURCE, preset, steps=40)
    assert len(losses) == 40 and falls(losses, 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("width", [12, 18])
def test_a_student_learns_its_teachers_latents(width):
    torch.manual_seed(0)
    teacher, student = TinyEncoder(24, 4), TinyEncoder(width, 4)
    before, fresh = state(teacher), state(student)
    preset = shrunken(first_stage_lr=2e-3)
    losses = distil_encoder(student, teacher, SOURCE, preset, steps=40)
    assert len(losses) == 40 and falls(losses, 0.7)
    assert same(before, state(teacher)) and not same(fresh, state(student))
    with torch.no_grad():
        image = SOURCE(4, seeded(9)).image(16)
        assert student(image).shape == (4, 4, 2, 2)
        assert not torch.equal(student(image), teacher(image))


@pytest.mark.slow
def test_decoder_learns_and_the_encoder_is_frozen():
    model = build()
    before, other = state(model.first_stage.encoder), state(model.first_stage.liif)
    losses = train_decoder(model.first_stage, SOURCE, model.preset, steps=40)
    assert len(losses) == 40 and falls(losses, 0.85)
    assert same(before, state(model.first_stage.encoder))
    assert not same(other, state(model.first_stage.liif))


@pytest.mark.slow
def test_first_stage_is_both(tmp_path):
    model = build()
    before = state(model.first_stage)
    losses = train_first_stage(model, SOURCE, autoencoder_steps=2, decoder_steps=3)
    assert len(losses) == 3
    after = state(model.first_stage)
    for part in ("encoder", "decoder", "liif"):
        assert not same({k: v for k, v in before.items() if k.startswith(part)}, after)
    run = Run(tmp_path, resume=True, sample_every=0)
    assert len(train_first_stage(model, SOURCE, 2, 0, run=run)) == 2
    assert len(train_first_stage(model, SOURCE, 2, 3, run=run)) == 3  # a part may follow later


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    stage = denoiser.DiffusionStage(model, lambda n, g: fixed, 8)
    run = Run()
    stage.prepare(run, make_accelerator(run.precision, model.device), 0)
    drawn = stage.draw(seeded(5), slice(2, 6))
    picks = torch.randint(8, (8,), generator=seeded(5))[2:6]
    with torch.no_grad():
        z = model.first_stage.encode(fixed.image(16)) * model.scale_factor
        condition = model.condition(resize(fixed.image(16), 4))
    torch.testing.assert_close(drawn["z0"], z[picks])
    torch.testing.assert_close(drawn["condition"], condition[picks])
    assert z.std().item() == pytest.approx(1, rel=1e-4)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="pool"):
        train_diffusion(build(), SOURCE, 1, pool=0)


@pytest.mark.parametrize("pool", [None, 5])
def test_each_whole_image_is_encoded_once_with_its_mirror_image(pool):
    model = build()
    images = [torch.rand(3, 16, 16, generator=seeded(k)) * 2 - 1 for k in range(3)]
    source = whole_source(images)
    assert source.distinct == 6 and photo_source(images, model.preset).distinct is None
    picked = source.pick(range(6)).image(16)
    assert all(torch.equal(picked[2 * k], images[k]) for k in range(3))
    assert torch.equal(picked[1::2], picked[::2].flip(-1))
    stage, run = denoiser.DiffusionStage(model, source, pool), Run()
    stage.prepare(run, make_accelerator(run.precision, model.device), 0)
    assert len(stage.latents) == (pool or 6)
    if pool is None:
        with torch.no_grad():
            z = model.first_stage.encode(picked)
        torch.testing.assert_close(stage.latents[torch.arange(6)][0], z)


# Options of the losses ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("crop", [0, 6, 100])
def test_windows_are_neighbouring_pixels(crop):
    """Of each picture its own, at most the whole of it."""
    model = build(crop=crop)
    stage = first_stage.DecoderStage(model.first_stage, SOURCE, model.preset, True)
    drawn = stage.draw(seeded(), slice(0, 4))
    cells = drawn["cells"]
    points = drawn["coords"][:, first_stage.POINTS :]  # beside scattered ones
    if not crop:
        assert drawn["coords"].shape == (4, first_stage.POINTS, 2)
        return
    side = math.isqrt(points.shape[1])
    size = round(2 / cells[0, 0].item())
    assert side == min(crop, size)
    window = points.view(4, side, side, 2)
    torch.testing.assert_close(
        window.diff(dim=1)[..., 0], torch.full((), 2 / size).expand(4, side - 1, side)
    )
    torch.testing.assert_close(
        window.diff(dim=2)[..., 1], torch.full((), 2 / size).expand(4, side, side - 1)
    )
    assert falls(train_decoder(model.first_stage, SOURCE, model.preset, 30), 0.9)


@pytest.mark.slow
def test_a_joint_posterior_is_sampled_and_pulled_to_the_prior():
    """A heavy divergence leaves nothing else: the encoder's output becomes a unit Gaussian."""
    model = build(posterior=True, kl_weight=100.0, first_stage_lr=3e-3)
    train_first_stage(model, SOURCE, 0, 60, joint=True)
    with torch.no_grad():
        posterior = model.first_stage.posterior(SOURCE(8, seeded()).image(16))
    assert posterior.kl().mean() < 0.02
    assert posterior.logvar.abs().mean() < 0.2


def test_v_is_another_reading_of_the_same_network():
    """A network that gives exactly v is read as the exact noise, and its loss is the error of v."""
    model = build(prediction="v")
    z0, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    alpha_bar = model.schedule.at(t, z0)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z0
    model.denoiser.forward = lambda z, t, condition: v
    eps = model.denoise()(model.schedule.add_noise(z0, t, noise), t)
    torch.testing.assert_close(eps, noise, atol=1e-4, rtol=1e-4)
    wrong = torch.randn(v.shape, generator=seeded())
    model.denoiser.forward = lambda z, t, condition: v + wrong
    stage = denoiser.DiffusionStage(model, SOURCE, 4)
    expected = wrong.square().mean()
    torch.testing.assert_close(stage(z0, t, noise), expected, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_v_learns_and_samples():
    model = build(prediction="v")
    assert falls(train_diffusion(model, SOURCE, steps=50, pool=64), 0.9)
    assert model.generate(1, 16, steps=3).isfinite().all()


@pytest.mark.parametrize(("size", "share"), [(32, 1), (64, 1), (128, 1 / 16)])
def test_lpips_counts_less_beyond_twice_what_the_encoder_sees(monkeypatch, size, share):
    model = build(lpips_weight=1.0, image_size=32, target_sizes=(size, size), crop=32)
    stage = first_stage.DecoderStage(model.first_stage, SOURCE, model.preset, True)
    drawn = stage.draw(seeded(), slice(0, 4))
    losses = []
    for value in (0.0, 5.0):
        monkeypatch.setattr(first_stage, "perceptual", lambda *_, value=value: value)
        losses.append(stage(**drawn).item())
    assert losses[1] - losses[0] == pytest.approx(5 * share, rel=1e-4)


@pytest.mark.skipif(not lpips_is_there(), reason="LPIPS needs AlexNet's weights (ARBSCALE_WEIGHTS)")
def test_lpips_enters_the_losses():
    sizes = {"image_size": 32, "target_sizes": (32, 40), "crop": 32}
    ends = []
    for weight in (0.0, 1.0):
        model = build(lpips_weight=weight, **sizes)
        torch.manual_seed(1)
        ends.append(train_first_stage(model, SOURCE, 1, 1)[0])
    assert ends[1] > ends[0] + 0.1


def test_the_lattice_enters_the_decoders_loss_with_its_weight(monkeypatch):
    model, losses = build(lattice_weight=7.0, crop=16), []
    stage = first_stage.DecoderStage(model.first_stage, SOURCE, model.preset, True)
    drawn = stage.draw(seeded(), slice(0, 4))
    for value in (0.0, 0.5):
        monkeypatch.setattr(first_stage, "lattice", lambda *_, value=value: value)
        losses.append(stage(**drawn).item())
    assert losses[1] - losses[0] == pytest.approx(3.5, rel=1e-4)


# What a run changes, and what it must not ---------------------------------------------------------


@pytest.mark.slow
def test_a_cached_pool_trains_the_same(tmp_path):
    ends = []
    for run in (
        None,
        Run(tmp_path / "a", latents=tmp_path / "z"),
        Run(latents=tmp_path / "z"),
    ):
        model = build(4)
        ends.append(train_diffusion(model, SOURCE, 3, pool=20, run=run))
    assert ends[0] == ends[1] == ends[2]
    assert (tmp_path / "z" / "record.json").is_file()


@pytest.mark.slow
def test_memory_is_saved_without_a_change():
    ends = []
    for run in (None, Run(checkpointing=True), Run(accumulation=4)):
        model = build()
        ends.append(train_diffusion(model, SOURCE, 4, pool=16, run=run))
    assert ends[1] == ends[0]
    assert ends[2] == pytest.approx(ends[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_learns_as_well(options):
    run = Run(**options)
    one, other = build(), build()
    for model, r in ((one, None), (other, run)):
        train_first_stage(model, SOURCE, 2, 2, run=r)
    ends = [train_diffusion(m, SOURCE, 20, pool=16, run=r) for m, r in ((one, None), (other, run))]
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in other.parameters())


@pytest.mark.slow
def test_previews_of_every_stage():
    for low_size in (None, 4):
        model = build(low_size)
        helper = presets.build_decoder(model.preset)
        made = [
            first_stage.AutoencoderStage(model.first_stage.encoder, helper, SOURCE, model.preset),
            first_stage.DecoderStage(model.first_stage, SOURCE, model.preset, True),
            denoiser.AlignmentStage(model, SOURCE, None),
        ]
        for stage in made:
            items = stage.preview()
            assert len(items) == 8 if stage is not made[2] else 6
            for (picture, _), (again, _) in zip(items, stage.preview(), strict=True):
                assert picture.shape[0] == 3 and torch.equal(picture, again)


def test_sources_know_what_they_draw(tmp_path):
    """So that a cache of latents of other pictures is noticed."""
    ramp = torch.linspace(-1, 1, 40).expand(3, 30, 40)
    preset = shrunken()
    assert photo_source([ramp], preset).identity == photo_source([ramp.clone()], preset).identity
    assert photo_source([ramp], preset).identity != photo_source([-ramp], preset).identity
    for name in "ab":
        to_pil(ramp).save(tmp_path / f"{name}.png")
    folder = ImageFolder(tmp_path)
    known = {photo_source(images, preset).identity for images in (folder, Subset(folder, [1]))}
    os.utime(tmp_path / "a.png", (1, 1))
    known.add(photo_source(folder, preset).identity)
    assert len(known) == 3
    shutil.copytree(tmp_path, tmp_path / "moved")
    moved = photo_source(ImageFolder(tmp_path / "moved"), preset)
    assert moved.identity == photo_source(folder, preset).identity
    assert moved.contents == {"images": {f"{n}.png": ANY for n in "ab"}, "sides": [16, 24]}
    subset = Subset([ramp, -ramp], [1])
    assert photo_source(subset, preset).identity == photo_source([-ramp], preset).identity
    assert photo_source(ConcatDataset([folder]), preset).identity is None
    assert scene_source(seed=1).identity != scene_source(seed=2).identity


@pytest.mark.parametrize(
    "draw", [SOURCE, photo_source([torch.rand(3, 40, 50) for _ in range(3)], shrunken())]
)
def test_parts_make_the_whole(draw):
    whole = draw(6, seeded()).image(12)
    parts = [draw(6, seeded(), part).image(12) for part in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole)


# Errors -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training():
    model = build()
    broken = PhotoBatch(torch.full((4, 3, 16, 16), float("nan")))
    with pytest.raises(RuntimeError, match="decoder.*nan.*step 0"):
        train_decoder(model.first_stage, lambda n, g: broken, model.preset, 3)


def test_the_lattice_loss_sees_what_repeats_with_the_latent_pixel():
    """Dots and dashes in one of 8 x 8 places are seen; as many elsewhere are not."""
    coords, texture = grid((66, 66))[None] * (66 / 64), torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn(1, 3, 66, 66, generator=texture)

    def loss(error: torch.Tensor) -> torch.Tensor:
        rgb = target + nn.functional.pad(error, (1, 1, 1, 1))
        return losses.lattice(rgb, target, coords, 8)

    places = torch.randperm(64 * 64, generator=texture)
    signs = torch.randn(8, 8, generator=texture).sign()
    for heights in (torch.ones(8, 8), signs - signs.mean()):
        dots = torch.zeros(64, 64)
        dots[5::8, 3::8] = heights
        assert loss(dots.flatten()[places].view(64, 64)) < loss(dots) / 10
    # The errors' part: a cosine is a coefficient of a half for each channel.
    smooth = (torch.arange(66) * (math.pi / 4)).cos().expand(1, 3, 66, 66)
    error = losses.lattice(smooth, torch.zeros_like(smooth), coords, 8)
    assert 3 * 0.5**2 < error < 3 * 0.6**2
    assert losses.lattice(target, target, grid((66, 66))[None], 40) == 0  # too fine to tell
