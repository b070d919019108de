"""The clock: what it counts. How long anything takes is not tested."""

from __future__ import annotations

import operator

import pytest
import torch
from PIL import Image

from arbscale import LIIF, ArbitraryScaleModel, metrics, presets
from arbscale.data import low_high_pair
from arbscale.evaluation import bench, reports


@pytest.mark.slow
def test_images_per_second_counts_the_batch():
    calls = []
    speed = bench.images_per_second(lambda: calls.append(1), batch=4, seconds=0.01)
    assert speed.images_per_second == pytest.approx(4 / speed.seconds)
    assert speed.repeats >= 1 and speed.spread >= 0 and len(calls) > speed.repeats


def test_one_call_is_timed_by_the_clock_that_waits_for_the_gpu(monkeypatch):
    events = []

    def clock():
        events.append("clock")
        return 2.0 * len(events)

    monkeypatch.setattr("torch.utils.benchmark.timer", clock)
    assert bench._once(lambda: events.append("call"), torch.device("cpu")).seconds == 4
    assert events == ["clock", "call", "clock"]


@pytest.mark.skipif(bench._peak(torch.device("cpu")) is None, reason="the system does not tell")
def test_the_peak_is_that_of_the_call_alone():
    def hungry():
        torch.ones(60_000_000).sum()

    small = bench.images_per_second(lambda: None, seconds=0.001).peak_megabytes
    large = bench.images_per_second(hungry, seconds=0.001).peak_megabytes
    after = bench.images_per_second(lambda: None, seconds=0.001).peak_megabytes
    assert large > small + 200 and after < large - 200


@pytest.fixture
def small(monkeypatch):
    """Make all sizes small: the published ones take minutes."""
    assert (bench.LATENT, bench.SIDES[0], bench.LARGER[-1]) == ((64, 64), 256, 16384)
    for name, value in (
        ("LATENT", (3, 4)),
        ("SIDES", (8, 12)),
        ("LARGER", (40, 60)),
        ("BAND", 700),
    ):
        monkeypatch.setattr(bench, name, value)
    generator = torch.Generator().manual_seed(0)
    photos = [torch.rand(3, 40, n, generator=generator) * 2 - 1 for n in (50, 36)]
    monkeypatch.setattr(bench, "open_dataset", lambda *_: photos)
    monkeypatch.setattr(bench, "lpips_or_why_not", lambda: False)


@pytest.mark.slow
def test_enlarging_is_timed_by_steps_and_precision_beside_small_tiles(small, monkeypatch):
    model = ArbitraryScaleModel(presets.tiny(8)).eval()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(bench, "STEPS", (1, 2))
    rows = bench._enlarging(model, 0.0)
    ways = [(row["precision"], row["steps"], row["tile"]) for row in rows]
    whole = [(name, n, None) for name in ("float32", "bfloat16") for n in (1, 2)]
    assert ways == [("float32", 5, 16), *whole]
    photos = [low_high_pair(image, 2) for image in bench.open_dataset()]
    megapixels = 40 * (50 + 36) / 1e6
    monkeypatch.setattr(
        bench, "images_per_second", lambda task, *_: task() or bench.Speed(1, 3.0, 0, 1, None)
    )
    (row, *_) = bench._enlarging(model, 0.0)
    assert row["seconds a megapixel"] == 3 / megapixels
    made = [model.upscale(bench.eight_bits(low), 2, steps=5, tile=16) for low, _ in photos]
    scores = [metrics.psnr(a, high, "y", 2) for a, (_, high) in zip(made, photos, strict=True)]
    assert row["psnr"] == pytest.approx(sum(scores) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("low_size", [None, 8])
def test_measure_has_every_row(low_size, small, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny(low_size)).eval()
    whole = bench._whole
    monkeypatch.setattr(bench, "_whole", lambda m, s, b, n, name: whole(m, s, b, 1, name))
    report = bench.measure(model, [16, (12, 20)], batch=2, seconds=0.001)
    rows = report["results"]
    tasks = [row["task"] for row in rows if row["size"] == [16, 16]]
    assert [t.split(",")[0] for t in tasks] == ["decoding alone"] + ["end to end"] * 2
    forms = [row["task"] for row in rows if row["size"] == [12, 12]]
    assert len(forms) == len(set(forms)) == 6
    assert [row["size"] for row in rows if row["task"] == forms[-1]] == [
        [side, side] for side in (8, 12, 40, 60)
    ]
    yardstick, ours = ([r for r in rows if r["task"] == name][1] for name in (forms[0], forms[-1]))
    assert ours["times as fast"] == yardstick["seconds"] / ours["seconds"]
    assert report["protocol"]["batch"] == 2 and report["machine"]["threads"] >= 1
    released = LIIF(128).parameters()
    text = reports.table(report)
    assert "times as fast as the released form" in text and "GFLOP/s" in text
    counted = 2 * sum(x.numel() for x in released if x.ndim == 2) * 4 * 12**2  # four neighbours
    assert yardstick["gigaflops"] * yardstick["seconds"] * 1e9 == pytest.approx(counted)
    assert report["protocol"]["peak gigaflops"] > 0
    assert ("| 2 | float32 | largest |" in text) == bool(low_size)
    bench.plot(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 500


@torch.no_grad()
def test_bands_cover_the_image_once(monkeypatch):
    monkeypatch.setattr(bench, "BAND", 50)
    windows = []
    bench._in_bands(lambda size, window: windows.append(window), (11, 20))
    assert windows == [(top, 0, min(2, 11 - top), 20) for top in range(0, 11, 2)]


@pytest.mark.parametrize("name", ["naive_render", "InterpolatedLIIF.query"])
def test_forms_of_one_head_must_agree(small, monkeypatch, name):
    right = operator.attrgetter(name)(bench)
    monkeypatch.setattr(f"arbscale.evaluation.bench.{name}", lambda *args: right(*args) + 0.01)
    with pytest.raises(RuntimeError):
        bench._forms(ArbitraryScaleModel(presets.tiny()).eval())


def test_memory_that_the_system_does_not_tell_is_none(monkeypatch):
    def refused(*args):
        raise OSError("read-only")

    monkeypatch.setattr(bench.Path, "write_text", refused)
    bench._reset_peak(torch.device("cpu"))
    assert bench._peak(torch.device("meta")) is None
