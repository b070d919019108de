"""The comparison of denoisers: equal costs, one command for both data sets, stopped and resumed."""

import dataclasses
import functools
import json

import pytest
import torch
from PIL import Image

from arbscale import ArbitraryScaleModel, presets, store, training
from arbscale.__main__ import main
from arbscale.diffusion import denoising_loss
from arbscale.evaluation import ablation, reports
from arbscale.evaluation.ablation import (
    COMPARISONS,
    CONTESTANTS,
    Settings,
    cost,
    count,
    held_out_loss,
)
from arbscale.evaluation.features import Extractor

CPU = torch.device("cpu")


@functools.cache
def costs(data):
    """Count the costs of every contestant that meets the others on these latents."""
    base = {"scenes": presets.scenes(), "cats": presets.cats()}[data]
    names = {name for where, names in COMPARISONS.values() if where == data for name in names}
    found = {}
    for name in sorted(names):
        found[name] = count(dataclasses.replace(base, low_size=None, **CONTESTANTS[name]))
    return found


@pytest.mark.parametrize("name", ["scenes", "photos-tiny"])
def test_the_presets_denoiser_is_the_winner_and_the_shipped_weights_are_of_the_first(name):
    shipped = presets.Preset.from_dict(store.read_manifest(store.find(name))["preset"])
    for preset, contestant in ((shipped, "unet"), (presets.get(name), "unet_transformer")):
        with torch.device("meta"):
            same = dataclasses.replace(preset, **CONTESTANTS[contestant])
            assert str(presets.build_denoiser(preset)) == str(presets.build_denoiser(same))


@pytest.mark.slow
@pytest.mark.parametrize("title", COMPARISONS)
def test_what_is_called_equal_is_equal(title):
    key = "parameters" if title.endswith("parameters") else "multiply_adds"
    data, names = COMPARISONS[title]
    first, *others = (costs(data)[name][key] for name in names)
    for other in others:
        assert other == pytest.approx(first, rel=0.033)


@pytest.mark.slow
def test_the_unet_with_a_transformer_is_equal_in_both():
    for key in ("parameters", "multiply_adds"):
        found = costs("scenes")
        assert found["unet_transformer"][key] == pytest.approx(found["unet"][key], rel=0.03)


@pytest.mark.slow
def test_costs_by_hand():
    """One level of residual blocks and nothing else but a 1 x 1 attention."""
    fields = {"unet_multipliers": (1,), "unet_blocks": 1, "unet_attention_levels": ()}
    preset = dataclasses.replace(presets.tiny(), image_size=2, diffusion_batch=2, **fields)
    found = cost(preset, CPU, seconds=0.0)
    width, time = 64, 256
    convolutions = 3 * width * 9 * 2  # stem and head
    convolutions += 3 * 2 * 9 * width**2 + 2 * 2 * 9 * width**2  # four blocks and a half ...
    convolutions += 2 * (width * width * 9) + 2 * (2 * width * width)  # ... whose input is double
    linear = 5 * time * width + width * time + time**2 + 4 * width**2 + 2 * width
    assert found["multiply_adds"] == convolutions + linear
    assert found["parameters"] == sum(
        p.numel() for p in presets.build_denoiser(preset).parameters()
    )
    assert found["milliseconds"] > 0 and found["kept_megabytes"] > 0


@pytest.mark.slow
def test_what_a_step_keeps_grows_with_the_batch():
    small, large = (dataclasses.replace(presets.tiny(), diffusion_batch=n) for n in (2, 6))
    a, b = (cost(preset, CPU, 0.0)["kept_megabytes"] for preset in (small, large))
    assert b == pytest.approx(3 * a, rel=0.05)


@torch.no_grad()
def test_held_out_loss_is_the_mean_over_all_pictures():
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny())
    torch.nn.init.normal_(model.denoiser.conv.weight, std=0.1)
    z0 = torch.randn(5, 3, 4, 4)
    found = held_out_loss(model, z0, batch=2)
    assert len(found) == ablation.TIMES
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(3))
    t = torch.full((5,), 350)
    whole = denoising_loss(model.denoiser, z0, t, noise, model.schedule).mean().item()
    assert found[3] == pytest.approx(whole, rel=1e-5)
    assert found == pytest.approx(held_out_loss(model, z0, batch=5), rel=1e-5)


def nine_colours(levels):
    return torch.nn.functional.adaptive_avg_pool2d(levels.float() / 255, 3).flatten(1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Put miniature models and a few cats where the real ones are looked for."""
    monkeypatch.setattr(store, "SHIPPED", (tmp_path / "models",))
    monkeypatch.setenv("ARBSCALE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ablation, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(ablation, "cost", functools.partial(cost, seconds=0.0))
    colours = Extractor("encoder", "colours of a 3 x 3 grid", 27, "", nine_colours)
    monkeypatch.setattr(ablation, "extractor", lambda *args: colours)
    light = {"transformer_width": 32, "transformer_blocks": 2, "unet_multipliers": (1,)}
    light |= {"unet_channels": 32}
    contestants = {name: fields | light for name, fields in CONTESTANTS.items()}
    contestants["transformer_light"]["transformer_blocks"] = 1
    monkeypatch.setattr(ablation, "CONTESTANTS", contestants)
    tiny = dataclasses.replace(presets.tiny(), diffusion_batch=4, image_size=16)
    monkeypatch.setattr(presets, "scenes", lambda: tiny)
    torch.manual_seed(0)
    ArbitraryScaleModel(tiny, manifest={"name": "scenes"}).save(tmp_path / "models" / "scenes")
    guided = dataclasses.replace(presets.tiny(), guide_multipliers=(1,), guidance=2.0)
    model = ArbitraryScaleModel(guided, manifest={"name": "cats"})  # contestants have no guide
    model.save(tmp_path / "models" / "cats")
    cats = tmp_path / "data" / "afhq_cats256"
    cats.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(256, (48, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(cats / f"{i:02d}.png")
    for split, names in (("train", range(12)), ("test", range(12, 24))):
        (cats / f"{split}.txt").write_text("".join(f"{i:02d}.png\n" for i in names))
    return tmp_path


QUICK = Settings(seeds=2, steps=2, pool=8, number=8)


def without_times(report):
    """Drop what the clock decides."""
    return [report["results"]["runs"], report["results"]["floors"], report["protocol"]]


@pytest.mark.slow
def test_one_command_for_both_data_sets(small, monkeypatch, capsys):
    out, folder = small / "out.json", small / "pieces"
    words = "--seeds 2 --steps 2 --pool 8 -n 8".split()
    assert main(["ablate", *words, "--folder", str(folder), "-o", str(out)]) == 0
    report = reports.read(out)
    runs = report["results"]["runs"]
    assert len(runs) == 2 * (4 + 2)
    assert {(r["data"], r["contestant"]) for r in runs} == {
        (data, name) for data, names in list(COMPARISONS.values())[:3] for name in names
    }
    for run in runs:
        assert len(run["losses"]) == ablation.TIMES
        assert run["loss"] == pytest.approx(sum(run["losses"]) / ablation.TIMES)
        assert run["distance"] > 0 and 0 <= run["precision"] <= 1 and 0 <= run["recall"] <= 1
    assert len({r["loss"] for r in runs}) == len(runs)
    said = capsys.readouterr().out
    assert "cats, equal compute:" in said and "| held-out real images |" in said
    assert "run 12 of 12: cats, unet_transformer, seed 1" in said
    monkeypatch.setattr(training, "train_diffusion", None)  # all is there: nothing runs again
    again = ablation.ablate(QUICK, folder)
    assert without_times(json.loads(json.dumps(again))) == without_times(report)


@pytest.mark.slow
def test_a_resumed_comparison_ends_as_a_whole_one(small, monkeypatch):
    settings = dataclasses.replace(QUICK, comparisons=("scenes, equal compute",))
    whole = ablation.ablate(settings, small / "whole")
    train, calls = training.train_diffusion, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("diffusion: stopped by SIGTERM")
        return train(*args)

    monkeypatch.setattr(training, "train_diffusion", stopped)
    with pytest.raises(RuntimeError, match="SIGTERM"):
        ablation.ablate(settings, small / "halves")
    halves = ablation.ablate(settings, small / "halves")
    assert len(calls) == 3 + 4
    assert without_times(halves) == without_times(whole)


@pytest.mark.slow
def test_other_settings_are_other_pieces(small):
    settings = dataclasses.replace(QUICK, comparisons=("scenes, equal compute",), seeds=1)
    longer = dataclasses.replace(settings, steps=3)
    pieces = [ablation.ablate(s, small / "p") for s in (settings, longer)]
    a, b = ([run["loss"] for run in report["results"]["runs"]] for report in pieces)
    assert not set(a) & set(b)


@pytest.mark.slow
def test_as_many_held_out_images_are_needed_as_are_generated(small):
    settings = dataclasses.replace(QUICK, comparisons=("cats, equal compute",), number=13)
    with pytest.raises(ValueError, match="afhq_cats256 has 12 "):
        ablation.ablate(settings, small / "p")


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="'dogs'.*scenes, equal compute"):
        Settings(comparisons=("dogs",))
    with pytest.raises(ValueError, match="seeds=0"):
        Settings(seeds=0)
