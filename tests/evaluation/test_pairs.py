"""Scores of images against their ground truth, with an untrained miniature."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from arbscale import ArbitraryScaleModel, evaluation, metrics, presets
from arbscale.data import ContinuousScenes, render_scenes, resize, sample_scenes
from arbscale.evaluation import (
    Partial,
    evaluate_pairs,
    reconstruction_rows,
    upscaling_rows,
)
from arbscale.evaluation.pairs import HALF, OWN, PROTOCOLS, eight_bits, score
from arbscale.samplers import Sampling
from arbscale.tiles import back_project

WHOLE = PROTOCOLS["whole"]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return [ArbitraryScaleModel(presets.tiny(low)).eval() for low in (None, 8)]


def photo(height: int = 50, width: int = 44) -> torch.Tensor:
    grid = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(grid, (height, width), mode="bilinear")[0]


def test_scenes_are_compared_with_the_exact_scene(models):
    scenes = ContinuousScenes(5, 20, seed=3, split="test")
    rows = reconstruction_rows(models[0], scenes, 2, 1.5, WHOLE)
    scene = sample_scenes(1, 3, scenes.first + 2)
    assert torch.equal(rows["truth"], render_scenes(scene, 48))
    assert list(rows) == ["truth", "bicubic", OWN, "ours (first stage)"]
    low = eight_bits(render_scenes(scene, 32))
    assert torch.equal(rows["bicubic"], resize(low, 48))
    z = models[0].first_stage.encode(low)
    torch.testing.assert_close(rows["ours (first stage)"], models[0].decode(z, 48))
    own = eight_bits(models[0].decode(z, 32))
    torch.testing.assert_close(rows[OWN], resize(own, 48), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="paper_faces"):
        reconstruction_rows(models[0], scenes, 2, 1.5, PROTOCOLS["paper_faces"])


def test_photographs_are_cropped_to_whole_latents(models):
    rows = reconstruction_rows(models[0], [photo(51, 45)], 0, 2, WHOLE)
    assert models[0].first_stage.factor == 2
    assert {x.shape for x in rows.values()} == {(1, 3, 48, 44)}
    assert torch.equal(rows["truth"][0], photo(51, 45)[:, :48, :44])
    with pytest.raises(ValueError, match="1 x 1.*2 px"):
        reconstruction_rows(models[0], [photo(8, 8)], 0, 6, WHOLE)


def test_from_x4_on_the_own_output_at_half_the_size_is_a_baseline(models):
    rule = PROTOCOLS["paper_faces"]
    rows = reconstruction_rows(models[0], [photo(66, 70)], 0, 4, rule)
    assert list(rows) == ["truth", "bicubic", OWN, HALF, "ours (first stage)"]
    assert {x.shape for x in rows.values()} == {(1, 3, 64, 64)}
    z = models[0].first_stage.encode(eight_bits(resize(rows["truth"], 16)))
    half = eight_bits(models[0].decode(z, 32))
    torch.testing.assert_close(rows[HALF], resize(half, 64), atol=0.01, rtol=0)
    assert HALF not in reconstruction_rows(models[0], [photo(66, 70)], 0, 3.9, rule)


@pytest.mark.slow
def test_upscaling_has_its_baselines(models):
    low, high = WHOLE.pair(photo(), 2)
    rows = upscaling_rows(models[1], photo(), 2, WHOLE, Sampling(2, "dpm_solver_pp", 4))
    assert torch.equal(rows["truth"][0], high)
    assert torch.equal(rows["bicubic"][0], resize(low, high.shape[-2:]))
    expected = models[1].upscale(low, size=tuple(high.shape[-2:]), seed=4, steps=2)
    assert torch.equal(rows["ours"][0], expected)
    ceiling = rows["first stage (ceiling)"][0]
    assert not torch.equal(ceiling, expected)
    again = back_project(ceiling, low).clamp(-1, 1)
    assert (again - ceiling).abs().mean() < 0.02  # it agrees with its input already


@pytest.mark.parametrize(("image", "low"), [(24, 16), (24, 9), (20, 16)])  # 0.75, 1.33, 0.625
def test_the_ceiling_lies_where_ours_does_at_any_zoom(image, low):
    """A first stage that gives its input back shows by how much the ceiling is displaced."""
    preset = dataclasses.replace(presets.tiny(low), image_size=image)
    model = ArbitraryScaleModel(preset).eval()
    seen = []
    model.first_stage.encode = lambda x: seen.append(x) or x[..., ::2, ::2]
    model.upscale = lambda given, size, **options: torch.zeros(3, *size)
    model.paint = lambda given, size, encodings: list(encodings)[0][1][0]
    tall = torch.linspace(-1, 1, 120)[:, None].expand(3, -1, 90)  # a ramp: it says its own place
    rows = upscaling_rows(model, tall, 2, WHOLE, Sampling(1, "dpm_solver_pp", 0))
    span = model.tiles((60, 45))[0]
    place = span.latent(model.zoom)
    assert seen[0].shape[-2:] == tuple(2 * (s.stop - s.start) for s in place[1:])
    found = rows["first stage (ceiling)"][0].mean((0, 2))  # by latent row
    pixels = (torch.arange(len(found)) + 0.5) / model.zoom - span.border  # in the input's
    wanted = (2 * pixels / 60 - 1).clamp(-1, 1)
    inside = (pixels > 3) & (pixels < 57)
    assert inside.sum() > 20
    assert (found - wanted)[inside].abs().max() < 2 / 60 * (1 + 1 / model.zoom)


def test_score_is_the_metrics_with_border_and_space():
    truth = photo()[None]
    rows = {"truth": truth, "worse": (truth + 0.1).clamp(-1, 1)}
    found = score(rows, "y", 4, with_lpips=False)
    worse = {
        name: getattr(metrics, name)(rows["worse"], truth, "y", 4) for name in ("psnr", "ssim")
    }
    assert found == {"worse": worse}


def test_means_are_over_pictures_and_an_interruption_is_survived(tmp_path, monkeypatch):
    truth = photo()[None]
    shifts = {0: 0.1, 1: 0.2, 2: 0.3}
    asked = []

    def rows(index, scale):
        asked.append((index, scale))
        if len(asked) == 3 and index == 2:
            raise KeyboardInterrupt
        return {"truth": truth, "grey": (truth + shifts[index] / scale).clamp(-1, 1)}

    def run():
        partial = Partial(tmp_path / "p", {"a": 1})
        return evaluate_pairs(rows, WHOLE, [1, 2], 3, partial, False)

    with pytest.raises(KeyboardInterrupt):
        run()
    results = run()
    assert asked == [(0, 1), (1, 1), (2, 1), (2, 1), (0, 2), (1, 2), (2, 2)]
    expected = [
        metrics.psnr((truth + s / 2).clamp(-1, 1), truth, "rgb", 0) for s in shifts.values()
    ]
    assert results["2"]["grey"]["psnr"] == pytest.approx(sum(expected) / 3)
    assert list(results) == ["1", "2"]


def test_lpips_or_why_not(monkeypatch, capsys):
    def missing(*images):
        raise FileNotFoundError("no weights; get them")

    monkeypatch.setattr(metrics, "lpips", missing)
    assert not evaluation.lpips_or_why_not()
    assert "no weights; get them" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "lpips", lambda *images: 0.0)
    assert evaluation.lpips_or_why_not()


def test_scales_that_differ_little_have_a_row_each(tmp_path):
    truth = photo()[None]

    def rows(index, scale):
        return {"truth": truth, "grey": (truth + 0.1 * (scale > 2)).clamp(-1, 1)}

    partial = Partial(tmp_path, {})
    results = evaluate_pairs(rows, WHOLE, [2.0000001, 2, 2.0], 1, partial, False)
    assert list(results) == ["2.0000001", "2"]
    assert results["2.0000001"] != results["2"]


def test_an_image_that_cannot_be_scored_is_named_with_its_scale():
    def rows(index, scale):
        return {"truth": torch.zeros(1, 3, 8, 8), "ours": torch.zeros(1, 3, 8, 8)}

    for name, fact in (({}, "image 0"), ({"name": "{}.png".format}, "0.png")):
        with pytest.raises(ValueError, match=f"{fact}.*x2.5"):
            evaluate_pairs(rows, WHOLE, [2.5], 1, Partial(None, {}), False, **name)
