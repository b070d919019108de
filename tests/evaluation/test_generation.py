"""Scores of generated images against real ones, with an untrained miniature."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from arbscale import ArbitraryScaleModel, presets
from arbscale.data import ContinuousScenes, resize
from arbscale.evaluation import Partial, features, sets
from arbscale.evaluation.features import Extractor
from arbscale.evaluation.sets import (
    CEILING,
    FLOOR,
    OURS,
    OWN,
    Job,
    RealPictures,
    evaluate_generation,
)
from arbscale.metrics import frechet_distance, precision_recall, self_ssim
from arbscale.samplers import SAMPLERS, Sampling

CALLS = []


def colours(name="encoder", device="cpu") -> Extractor:
    """Return a network of nine numbers that counts its calls."""

    def network(levels):
        CALLS.append(len(levels))
        cells = torch.nn.functional.adaptive_avg_pool2d(levels.float() / 255, (1, 3))
        return cells.flatten(1)

    return Extractor(name, f"{name}, stand-in, 9 numbers", 9, "0", network)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sets, "extractor", colours)
    CALLS.clear()


@pytest.fixture
def job():
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny()).eval()
    real, others = (RealPictures(ContinuousScenes(24, 32, split=s), 24) for s in ("train", "test"))
    sizes, sampling = ((32, 32), (40, 40)), Sampling(steps=2, seed=1)
    return Job(model, real, others, sizes, 22, "encoder", sampling)


@pytest.mark.slow
def test_every_size_has_its_rows_and_they_are_what_they_say(job, tmp_path):
    results = evaluate_generation(job, Partial(tmp_path / "p", {}))
    found = {(row["size"][0], row["method"]): row for row in results["rows"]}
    assert set(found) == {(32, OURS), (32, CEILING), (32, FLOOR)} | {
        (40, m) for m in (OWN, OURS, CEILING, FLOOR)
    }
    assert {row["pictures"] for row in results["rows"]} == {22}
    # The numbers again, from images made here.
    z = torch.cat([job.model.sample(20, 100_000, 2), job.model.sample(2, 100_001, 2)])
    size, network = (40, 40), colours()
    train, test = (ContinuousScenes(24, size, split=s).batch(0, 24) for s in ("train", "test"))
    encoded = job.model.first_stage.encode(ContinuousScenes(24, 32, split="test").batch(0, 24))
    own = ((job.model.decode(z, 32) + 1) * 127.5).round() / 127.5 - 1
    pictures = {
        OURS: job.model.decode(z, size),
        OWN: resize(own, size),
        CEILING: job.model.decode(encoded[:22], size).detach(),
        FLOOR: test[:22],
    }
    for method, images in pictures.items():
        seen, real = network(images), network(train)
        expected = frechet_distance(seen, real)
        assert found[40, method]["distance"] == pytest.approx(expected, rel=0.02, abs=1e-5)
        precision, recall = precision_recall(seen, real)
        assert found[40, method]["precision"] == pytest.approx(precision, abs=0.05)
        assert found[40, method]["recall"] == pytest.approx(recall, abs=0.05)
        assert all(found[40, method][f"{k}_pm"] >= 0 for k in ("distance", "precision", "recall"))
    assert found[40, FLOOR]["distance"] < found[40, OURS]["distance"]
    matrix = self_ssim(
        {32: pictures[OURS].new_tensor(0) + job.model.decode(z, 32), 40: pictures[OURS]}
    )
    found_matrix = torch.tensor(results["self_ssim"][OURS]["clean"], dtype=torch.float64)
    torch.testing.assert_close(found_matrix, matrix, rtol=0, atol=1e-4)
    assert set(results["self_ssim"][OWN]) == {"clean", "scaleparty"}
    patches = results["patches"]
    assert patches["side"] == 32 and patches["sizes"] == [32, 40] and patches["patches"] == 22
    assert patches["distance"] > 0
    assert results["neighbours"] is None  # of endless scenes


@pytest.mark.slow
def test_an_interruption_costs_one_batch_and_the_reference_is_kept(job, tmp_path, monkeypatch):
    whole = evaluate_generation(job, Partial(None, {}))
    seen, decode = [], sets.decode

    def stops(model, z, size):
        seen.append(size)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return decode(model, z, size)

    sampled = []
    sample = ArbitraryScaleModel.sample
    monkeypatch.setattr(
        ArbitraryScaleModel,
        "sample",
        lambda *a, **how: sampled.append(1) or sample(*a, **how),
    )
    monkeypatch.setattr(sets, "decode", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_generation(job, Partial(tmp_path / "p", {}))
    kept = sorted(path.name for path in (tmp_path / "p").rglob("32x32*"))
    assert kept == [
        f"32x32-{m}-0000{k}.safetensors"
        for m, k in [("first", "00"), ("ours", "00"), ("ours", "20")]
    ]
    again = evaluate_generation(job, Partial(tmp_path / "p", {}))
    assert len(sampled) == 2  # both batches before the interruption
    assert again == whole
    assert sum(CALLS) > 0
    CALLS.clear()
    evaluate_generation(job, Partial(tmp_path / "p", {}))  # all pieces and the reference are there
    assert CALLS == []


@pytest.mark.slow
def test_fewer_real_images_than_generated_ones_have_no_rows(job, capsys):
    job = dataclasses.replace(job, others=RealPictures(job.others.images, 8), sizes=((32, 32),))
    sets.check(job, False)
    assert "8" in capsys.readouterr().err
    rows = evaluate_generation(job, Partial(None, {}))["rows"]
    assert [(row["method"], row["pictures"]) for row in rows] == [(OURS, 22)]


@pytest.mark.slow
def test_sizes_without_real_pictures_have_no_distance(job, tmp_path, capsys):
    images = [torch.rand(3, 36, 44) * 2 - 1 for _ in range(9)]
    job = dataclasses.replace(
        job, real=RealPictures(images, 9), others=RealPictures(images, 9), n=9
    )
    results = evaluate_generation(job, Partial(None, {}))
    assert {tuple(row["size"]) for row in results["rows"]} == {(32, 32)}
    told = capsys.readouterr().err
    assert "40 x 40" in told and "36 x 44" in told
    assert results["patches"]["sizes"] == [32, 36]
    assert results["neighbours"]["pictures"] == 9
    assert results["neighbours"][FLOOR] == pytest.approx([0] * 5, abs=1e-6)  # they are the same
    assert 0 < results["neighbours"][OURS][0] <= results["neighbours"][OURS][-1]
    floor = next(row for row in results["rows"] if row["method"] == FLOOR)
    assert floor["distance"] == pytest.approx(0, abs=1e-9)
    assert (floor["precision"], floor["recall"]) == (1, 1)
    alone = evaluate_generation(dataclasses.replace(job, sizes=((32, 32),)), Partial(None, {}))
    assert alone["self_ssim"] is None
    mixed = RealPictures([*images[1:], images[0][:, :34, :34]], 9)
    mixed = dataclasses.replace(job, real=mixed, partial=Partial(None, {}))
    assert sets._patches(mixed, colours())["sizes"] == [32, 34]
    small = dataclasses.replace(job, real=RealPictures([x[:, :32, :32] for x in images], 9))
    assert evaluate_generation(small, Partial(None, {}))["patches"] is None


def test_real_images_are_reduced_never_enlarged():
    image = torch.rand(3, 60, 90) * 2 - 1
    real = RealPictures([image] * 8, 8)
    square = resize(image[:, :, 15:75], (30, 30))
    torch.testing.assert_close(real.one(3, (30, 30)), square)
    torch.testing.assert_close(real.one(3, (30, 30), (4, 5, 10, 12)), square[:, 4:14, 5:17])
    assert real.batch(0, (30, 30)).shape == (8, 3, 30, 30)
    with pytest.raises(ValueError, match="image 2.* 60 x 60.* 61 x 61"):
        real.one(2, (61, 61))
    scenes = RealPictures(ContinuousScenes(8, 16), 8)
    crop = scenes.one(1, (40, 40), (3, 4, 20, 30))
    torch.testing.assert_close(crop, scenes.one(1, (40, 40))[:, 3:23, 4:34])
    with pytest.raises(ValueError, match="8 .*7"):
        RealPictures([image] * 7, 7)


def test_jobs_that_cannot_be_done(job):
    with pytest.raises(ValueError, match="aspect ratio"):
        sets.check(dataclasses.replace(job, sizes=((32, 32), (32, 64))), False)
    with pytest.raises(ValueError, match="16 px"):
        sets.check(dataclasses.replace(job, sizes=((32, 32), (12, 12))), False)
    with pytest.raises(ValueError, match="'clip'.*encoder, alexnet"):
        sets.check(dataclasses.replace(job, features="clip"), False)
    few = dataclasses.replace(job, features="inception")
    with pytest.raises(ValueError, match="2048 .*22.*--allow-few"):
        sets.check(few, False)
    with pytest.warns(UserWarning, match="22"):
        sets.check(few, True)


@pytest.mark.slow
def test_inception_goes_with_vgg16(job):
    seen = sets.protocol(dataclasses.replace(job, features="inception"))
    assert seen["distance over"].startswith("inception")
    assert seen["precision and recall over"].startswith("vgg16")
    results = evaluate_generation(
        dataclasses.replace(job, features="inception", sizes=((40, 40),)), Partial(None, {})
    )
    assert len(results["rows"]) == 4


@pytest.mark.slow
def test_the_real_encoder_serves(job, monkeypatch):
    monkeypatch.setattr(sets, "extractor", features.extractor)
    small = dataclasses.replace(
        job,
        sizes=((40, 40),),
        n=8,
        real=RealPictures(job.real.images, 8),
        others=RealPictures(job.others.images, 8),
    )
    rows = evaluate_generation(small, Partial(None, {}))["rows"]
    assert all(row["distance"] > 0 for row in rows)
    assert "photos-tiny's encoder" in sets.protocol(small)["distance over"]


@pytest.mark.slow
def test_steps_are_compared_on_one_noise(job, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "STEPS", (1, 3))
    partial = Partial(tmp_path / "p", {})
    found = sets.evaluate_steps(job, partial)
    assert [(row["sampler"], row["steps"]) for row in found["rows"]] == [
        (sampler, n) for sampler in SAMPLERS for n in (1, 3)
    ]
    z = torch.cat(
        [job.model.sample(20, 100_000, 3, "ddim"), job.model.sample(2, 100_001, 3, "ddim")]
    )
    real = colours()(ContinuousScenes(24, 32, split="train").batch(0, 24))
    expected = frechet_distance(colours()(job.model.decode(z, 32)), real)
    row = next(x for x in found["rows"] if (x["sampler"], x["steps"]) == ("ddim", 3))
    assert row["distance"] == pytest.approx(expected, rel=0.02) and row["distance_pm"] > 0
    assert row["seconds"] > 0
    one_step = [row["distance"] for row in found["rows"] if row["steps"] == 1]
    assert one_step == pytest.approx([one_step[0]] * len(one_step))  # all are the first estimate
    assert "ceiling" not in found  # 24 other images, 22 samples: not as many
    CALLS.clear()
    assert sets.evaluate_steps(job, partial) == found and CALLS == []  # from the kept pieces
    others = RealPictures(job.others.images, 22)
    whole = evaluate_generation(dataclasses.replace(job, sizes=((32, 32),)), partial)["rows"]
    ceiling = sets.evaluate_steps(dataclasses.replace(job, others=others), partial)["ceiling"]
    row = next(row for row in whole if row["method"] == CEILING)
    assert ceiling["distance"] == pytest.approx(row["distance"])
