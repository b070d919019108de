"""The patch discriminator, the decoder's stage with it, and weights between two models."""

import dataclasses

import pytest
import torch

import arbscale
from arbscale import presets
from arbscale.__main__ import main
from arbscale.model import ArbitraryScaleModel
from arbscale.training import Run, scene_source, train_decoder
from arbscale.training.first_stage import DecoderStage
from arbscale.training.losses import PatchDiscriminator

SOURCE = scene_source(count=200)


def build(**changes) -> ArbitraryScaleModel:
    torch.manual_seed(0)
    small = {"image_size": 16, "target_sizes": (16, 24), "hidden": (32,), "first_stage_batch": 4}
    small |= {"adversarial_weight": 0.5, "crop": 16}
    return ArbitraryScaleModel(dataclasses.replace(presets.tiny(), **(small | changes)))


def windows(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_judges_patches_and_knows_the_scale():
    torch.manual_seed(0)
    judge, x = PatchDiscriminator().eval(), windows().requires_grad_()
    assert judge(x, torch.tensor(0.0)).shape == (4, 1, 2, 2)
    assert (judge(x, torch.tensor(1.0)) - judge(x, torch.tensor(0.0))).abs().max() > 1e-3
    large = torch.zeros(1, 3, 128, 128, requires_grad=True)
    judge(large, torch.tensor(0.0))[0, 0, 8, 8].backward()
    seen = large.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [38, 38]


def test_each_loss_teaches_its_own_network():
    torch.manual_seed(0)
    judge, made = PatchDiscriminator(), windows().requires_grad_()
    deceived, judged = judge.losses(made, windows(1), torch.tensor(0.0))
    (gradient,) = torch.autograd.grad(deceived, made, retain_graph=True)
    assert gradient.abs().sum() > 0
    own = torch.autograd.grad(deceived, judge.parameters(), retain_graph=True, allow_unused=True)
    assert all(g is None for g in own)
    judged.backward()
    assert made.grad is None
    assert all(p.grad is not None for p in judge.parameters())


@pytest.mark.slow
def test_the_discriminator_tells_smooth_from_rough():
    torch.manual_seed(0)
    judge, scale = PatchDiscriminator(), torch.tensor(0.0)
    optimiser = torch.optim.Adam(judge.parameters(), lr=1e-3)
    smooth = windows(2).mean(dim=(2, 3), keepdim=True).expand(4, 3, 16, 16)
    for seed in range(30):
        optimiser.zero_grad()
        judge.losses(smooth, windows(seed), scale)[1].backward()
        optimiser.step()
    assert judge(windows(99), scale).mean() > judge(smooth, scale).mean() + 0.5


@pytest.mark.parametrize(("size", "share"), [(16, 1), (32, 1), (64, 1 / 16)])
def test_its_opinion_counts_less_beyond_twice_what_the_encoder_sees(monkeypatch, size, share):
    model = build(target_sizes=(size, size))
    stage = DecoderStage(model.first_stage, SOURCE, model.preset, True)
    drawn, losses = stage.draw(torch.Generator().manual_seed(0), slice(0, 4)), []
    for value in (0.0, 2.0):
        given = (torch.tensor(value), torch.tensor(0.25))
        monkeypatch.setattr(PatchDiscriminator, "losses", lambda *_, given=given: given)
        losses.append(stage(**drawn).item())
    assert losses[1] - losses[0] == pytest.approx(2 * 0.5 * share, rel=1e-4)


@pytest.mark.slow
def test_the_stage_trains_both_and_resumes(tmp_path):
    ends = []
    for stops in ([4], [2, 4]):
        for steps in stops:
            torch.manual_seed(0)
            model = build()
            folder = tmp_path / str(len(stops))
            if steps == 2:
                with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    interrupt_at(patch, 3)
                    train(model, folder)
            else:
                train(model, folder)
        ends.append(model.first_stage.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    fresh = build().first_stage.state_dict()
    assert any(not torch.equal(fresh[k], ends[0][k]) for k in fresh if k.startswith("liif"))
    assert all(torch.equal(fresh[k], ends[0][k]) for k in fresh if k.startswith("encoder"))


def train(model: ArbitraryScaleModel, folder) -> None:
    torch.manual_seed(7)  # draws the discriminator
    run = Run(folder, resume=True, save_every=1, keep=1)
    train_decoder(model.first_stage, SOURCE, model.preset, 4, run=run)


def interrupt_at(patch: pytest.MonkeyPatch, call: int) -> None:
    losses, calls = PatchDiscriminator.losses, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return losses(self, *args)

    patch.setattr(PatchDiscriminator, "losses", counted)


# Weights between two models -----------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    for i in range(2):
        torch.manual_seed(i)
        terms = ("CC BY-NC 4.0, as the images", "MIT; procedural")[i]  # the stricter one wins
        ArbitraryScaleModel(presets.tiny(), manifest={"licence": terms}).save(tmp_path / f"{i}")
    return tmp_path


@pytest.mark.slow
def test_weights_are_interpolated(two):
    words = ["blend", str(two / "0"), str(two / "1"), "--share", "0.25", "-o", str(two / "c")]
    assert main(words) == 0
    a, b, c = (arbscale.load(two / name) for name in "01c")
    pairs = zip(a.parameters(), b.parameters(), c.parameters(), strict=True)
    for x, y, z in pairs:
        torch.testing.assert_close(z, 0.75 * x + 0.25 * y, atol=2e-3, rtol=2e-3)
    assert len(c.manifest["commands"]) == 1 and c.manifest["licence"].startswith("CC BY-NC")
    assert c.generate(1, 16, steps=1).isfinite().all()


@pytest.mark.parametrize("case", ["share", "network", "scale"])
def test_what_has_no_between_is_refused(two, capsys, case):
    if case == "network":
        ArbitraryScaleModel(presets.tiny(low_size=8)).save(two / "1")
    if case == "scale":
        ArbitraryScaleModel(presets.tiny(), 2.0).save(two / "1")
    share = "1.5" if case == "share" else "0.5"
    words = ["blend", str(two / "0"), str(two / "1"), "--share", share, "-o", str(two / "c")]
    assert main(words) == 2
    assert case in capsys.readouterr().err and not (two / "c").exists()
