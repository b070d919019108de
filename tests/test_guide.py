"""A weaker denoiser guides sampling: the formula, the model that has one, and the command."""

import dataclasses

import pytest
import torch

import arbscale
from arbscale import presets
from arbscale.__main__ import main
from arbscale.diffusion import guided
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import Sampling


def preset(**changes):
    return dataclasses.replace(presets.tiny(), **changes)


@torch.no_grad()
def noisy(module):
    """Give a network weights that all matter; new ones end in zeros."""
    for p in module.parameters():
        p.add_(0.05 * torch.randn(p.shape))


def model(seed=0, **changes):
    torch.manual_seed(seed)
    made = ArbitraryScaleModel(preset(**changes), manifest={"licence": "MIT", "minutes": 1.0})
    noisy(made.denoiser)
    if made.guide is not None:
        noisy(made.guide)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def with_guide():
    return model(guide_multipliers=(1,), guidance=3.0)


def test_guidance_goes_on_beyond_the_denoiser():
    z, t = torch.randn(2, 3, 4, 4), torch.tensor([5, 5])
    better, weaker = (lambda z, t: 2 * z), (lambda z, t: 0.5 * z + t.view(-1, 1, 1, 1))
    for weight in (0.0, 1.0, 2.5):
        expected = weaker(z, t) + weight * (better(z, t) - weaker(z, t))
        torch.testing.assert_close(guided(better, weaker, weight)(z, t), expected)


def test_a_guide_is_a_plain_u_net_of_its_own_levels(with_guide):
    assert len(with_guide.guide.down) == 1 < len(with_guide.denoiser.down)
    assert model().guide is None
    mixed = model(denoiser="unet_transformer", guide_multipliers=(1,))
    assert type(mixed.guide.middle) is type(model().denoiser.middle)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_both_networks_are_read_as_noise(prediction):
    made = model(guide_multipliers=(1,), guidance=2.0, prediction=prediction)
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    alone, guide = made.denoise()(z, t), model_of(made, made.guide)(z, t)
    torch.testing.assert_close(made.denoise(guidance=None)(z, t), 2 * alone - guide)
    torch.testing.assert_close(made.denoise(guidance=1)(z, t), alone)
    torch.testing.assert_close(made.denoise(guidance=0)(z, t), guide)


def model_of(made, network):
    other = ArbitraryScaleModel(dataclasses.replace(made.preset, guide_multipliers=()))
    other.denoiser = network
    return other.denoise()


def test_sampling_takes_the_presets_weight_unless_told(with_guide):
    same = {"n": 1, "size": 16, "steps": 3, "seed": 4}
    usual = with_guide.generate(**same)
    assert torch.equal(usual, with_guide.generate(**same, guidance=3.0))
    alone = with_guide.generate(**same, guidance=1)
    assert not torch.allclose(usual, alone, atol=1e-3)
    bare = ArbitraryScaleModel(preset())
    state = with_guide.state_dict().items()
    bare.load_state_dict({k: v for k, v in state if not k.startswith("guide.")})
    assert torch.equal(alone, bare.generate(**same))


def test_a_super_resolver_has_one_too():
    made = model(low_size=8, guide_multipliers=(1,), guidance=2.0)
    low = torch.rand(3, 9, 10) * 2 - 1
    images = [made.upscale(low, 2, guidance=weight) for weight in (None, 2.0, 1.0)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_guidance_without_a_guide_says_so():
    with pytest.raises(RuntimeError, match="no guide"):
        model().generate(1, 16, steps=1, guidance=2.0)
    with pytest.raises(ValueError, match="guidance"):
        Sampling(guidance=float("nan"))


def test_it_is_saved_and_loaded(with_guide, tmp_path):
    with_guide.save(tmp_path)
    again = arbscale.load(tmp_path)
    assert again.preset == with_guide.preset
    assert torch.equal(again.generate(1, 16, steps=2), with_guide.generate(1, 16, steps=2))


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    model(0).save(tmp_path / "a")
    model(1, unet_multipliers=(1,)).save(tmp_path / "b")
    return tmp_path


def run(folders, *more):
    return main(["guide", *(str(folders / name) for name in "ab"), "-o", str(folders / "c"), *more])


@pytest.mark.slow
def test_the_command_joins_two_models(folders):
    assert run(folders, "--weight", "1.5") == 0
    a, b, c = (arbscale.load(folders / name) for name in "abc")
    assert c.preset.guidance == 1.5 and c.preset.guide_multipliers == (1,)
    assert c.manifest["minutes"] == 2.0 and len(c.manifest["commands"]) == 1
    pairs = (a.first_stage, c.first_stage), (a.denoiser, c.denoiser), (b.denoiser, c.guide)
    for x, y in pairs:
        for p, q in zip(x.parameters(), y.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["transformer", "prediction", "scale", "schedule"])
def test_what_cannot_guide_is_refused(folders, capsys, case):
    changes = {
        "transformer": {"denoiser": "transformer"},
        "prediction": {"prediction": "v"},
        "schedule": {"beta_end": 0.03},
    }
    made = model(1, unet_multipliers=(1,), **changes.get(case, {}))
    made.scale_factor = 2.0 if case == "scale" else 1.0
    made.save(folders / "b")
    assert run(folders) == 2
    said = capsys.readouterr().err
    assert "fit" in said if case == "transformer" else case in said
    assert not (folders / "c").exists()


@pytest.mark.slow
def test_training_on_leaves_the_guide_alone(with_guide, tmp_path):
    with_guide.save(tmp_path / "start")
    words = ["train", "tiny", "--start", str(tmp_path / "start"), "--steps", "0", "0", "2", "0"]
    words += ["--pool", "8", "--folder", str(tmp_path / "run"), "--sample-every", "0"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    out, start = arbscale.load(tmp_path / "out"), arbscale.load(tmp_path / "start")
    for (name, p), q in zip(out.guide.named_parameters(), start.guide.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=2e-3, msg=name)
    moved = zip(out.denoiser.parameters(), start.denoiser.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in moved)
