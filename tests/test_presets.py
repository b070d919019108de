"""The numbers of the paper's models, and presets that travel as JSON."""

import dataclasses
import json

import pytest
import torch

from arbscale import presets
from arbscale.presets import PRESETS, Preset


def millions(build, preset) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in build(preset).parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "first_stage", "denoiser"),
    [
        ("paper_generation_256", 52.6, 274),
        ("paper_faces_sr", 53.0, 411),
        ("paper_div2k_sr", 52.6, 114),
        ("paper_tower_sr", 79.0, None),
    ],
)
def test_the_papers_models_have_their_size(name, first_stage, denoiser):
    preset = presets.get(name)
    assert millions(presets.build_first_stage, preset) == pytest.approx(first_stage, abs=0.05)
    if denoiser:
        assert millions(presets.build_denoiser, preset) == pytest.approx(denoiser, abs=0.5)


@pytest.mark.parametrize(
    ("name", "image", "low", "latent", "channels", "targets", "betas"),
    [
        ("paper_generation_256", 256, None, 64, 3, (64, 256), (0.0015, 0.0195)),
        ("paper_faces_sr", 128, 16, 32, 32, (32, 128), (0.0001, 0.015)),
        ("paper_div2k_sr", 192, 48, 48, 3, (48, 192), (0.0015, 0.0155)),
        ("paper_tower_sr", 256, 16, 32, 32, (32, 256), (0.0001, 0.015)),
    ],
)
def test_the_papers_sizes(name, image, low, latent, channels, targets, betas):
    preset = presets.get(name)
    assert (preset.image_size, preset.low_size, preset.target_sizes) == (image, low, targets)
    assert (preset.latent_size, preset.latent_channels) == (latent, channels)
    assert (preset.beta_start, preset.beta_end, preset.diffusion_steps) == (*betas, 1000)
    assert preset.hidden == (256,) * 4 and preset.local_ensemble and preset.cell_decode
    assert preset.posterior == (channels == 32) and preset.groups == 32


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound(name):
    preset = presets.get(name)
    assert preset.name == name
    assert preset.unet_channels >= 64, "narrower, the U-Net is blind to its step"
    assert preset.channels % preset.groups == 0
    assert preset.image_size % preset.factor == 0
    assert preset.latent_size * preset.factor == preset.image_size
    with torch.device("meta"):
        denoiser = presets.build_denoiser(preset)
    assert denoiser.condition_channels == (preset.latent_channels if preset.low_size else 0)
    assert presets.build_schedule(preset).steps == preset.diffusion_steps


@pytest.mark.parametrize("name", ["tiny", "scenes", "cats", "photos", "photos-tiny"])
def test_a_slider_stays_live_with_the_shipped_presets(name):
    hidden = presets.get(name).hidden
    assert len(hidden) <= 4 and max(hidden) <= 96


@pytest.mark.parametrize("name", PRESETS)
def test_through_json_and_back(name):
    preset = presets.get(name)
    assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


def test_tiny_can_be_either():
    assert presets.tiny().low_size is None
    assert presets.tiny(8).low_size == 8


def test_the_options_of_liif_arrive():
    preset = dataclasses.replace(presets.tiny(), local_ensemble=False, cell_decode=False)
    liif = presets.build_first_stage(preset).liif
    assert (liif.local_ensemble, liif.cell_decode) == (False, False)


def test_the_groups_arrive_everywhere_in_the_first_stage():
    preset = dataclasses.replace(presets.tiny(), groups=4)
    for build in (presets.build_first_stage, presets.build_encoder, presets.build_decoder):
        modules = build(preset).modules()
        assert {m.num_groups for m in modules if isinstance(m, torch.nn.GroupNorm)} == {4}


def test_the_ordinary_decoder_fits_the_encoder():
    preset = presets.tiny()
    with torch.no_grad():
        z = presets.build_encoder(preset)(torch.zeros(1, 3, 8, 12))
        assert presets.build_decoder(preset)(z).shape == (1, 3, 8, 12)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="big.*photos-tiny"):
        presets.get("big")


def test_a_field_that_is_missing_takes_its_default():
    values = presets.tiny().to_dict()
    del values["head"], values["noise_level"]
    assert Preset.from_dict(values) == dataclasses.replace(presets.tiny(), noise_level=1.0)


@pytest.mark.parametrize("values", [{}, [], "tiny", None, {"name": 3}], ids=repr)
def test_a_preset_without_a_name(values):
    with pytest.raises(ValueError, match="name"):
        Preset.from_dict(values)


def test_a_field_that_is_unknown_is_named():
    with pytest.raises(ValueError, match="depth"):
        Preset.from_dict(presets.tiny().to_dict() | {"depth": 3})


@pytest.mark.parametrize("field", ["encoder", "head", "denoiser"])
def test_a_part_that_is_unknown_is_named(field):
    with pytest.raises(ValueError, match="sparse"):
        dataclasses.replace(presets.tiny(), **{field: "sparse"})


@pytest.mark.parametrize("crop", [0, 1, 4])
@pytest.mark.parametrize("weight", ["lattice_weight", "adversarial_weight"])
def test_a_weight_of_windows_needs_windows(weight, crop):
    with pytest.raises(ValueError, match="crop"):
        dataclasses.replace(presets.tiny(), crop=crop, **{weight: 1.0})


def test_the_options_of_the_tiny_encoder_and_the_interpolated_head_arrive():
    options = {"encoder": "tiny", "tiny_channels": 16, "head": "interpolated", "finer": 3}
    preset = dataclasses.replace(presets.tiny(), **options, padding="reflect")
    first_stage = presets.build_first_stage(preset)
    assert preset.factor == first_stage.factor == 8
    assert first_stage.encoder.layers[0].out_channels == 16 and first_stage.liif.finer == 3
    kernels = [m for m in first_stage.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.padding_mode for m in kernels if m.kernel_size == (3, 3)} == {"reflect"}
    with torch.no_grad():
        z = first_stage.encode(torch.zeros(1, 3, 16, 24))
        assert first_stage.decode(z, (5, 7)).shape == (1, 3, 5, 7)
        assert presets.build_decoder(preset)(z).shape == (1, 3, 16, 24)


def test_the_cats_are_within_their_bounds():
    preset = presets.cats()
    assert millions(presets.build_denoiser, preset) <= 13
    student = dataclasses.replace(preset, tiny_channels=40)
    both = [millions(b, student) for b in (presets.build_first_stage, presets.build_denoiser)]
    assert 2 * sum(both) <= 30, "megabytes in half precision"


def test_a_preset_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.tiny().channels = 64
