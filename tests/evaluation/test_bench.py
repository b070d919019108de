"""The clock: what it counts. How long anything takes is not tested."""

from __future__ import annotations

import pytest
import torch

from arbscale import ArbitraryScaleModel, presets
from arbscale.evaluation import bench


def test_images_per_second_counts_the_batch():
    calls = []
    speed = bench.images_per_second(lambda: calls.append(1), batch=4, seconds=0.01)
    assert speed.images_per_second == pytest.approx(4 / speed.seconds)
    assert speed.repeats >= 1 and speed.spread >= 0 and len(calls) > speed.repeats


@pytest.mark.skipif(bench._peak(torch.device("cpu")) is None, reason="the system does not tell")
def test_the_peak_is_that_of_the_call_alone():
    def hungry():
        torch.ones(60_000_000).sum()

    small = bench.images_per_second(lambda: None, seconds=0.001).peak_megabytes
    large = bench.images_per_second(hungry, seconds=0.001).peak_megabytes
    after = bench.images_per_second(lambda: None, seconds=0.001).peak_megabytes
    assert large > small + 200 and after < large - 200


@pytest.mark.parametrize("low_size", [None, 8])
def test_measure_has_every_row(low_size, monkeypatch):
    torch.manual_seed(0)
    model = ArbitraryScaleModel(presets.tiny(low_size)).eval()
    whole = bench._whole
    monkeypatch.setattr(bench, "_whole", lambda m, s, b, n, name: whole(m, s, b, 1, name))
    assert bench.PAPER_SIZE == (256, 256)
    monkeypatch.setattr(bench, "PAPER_SIZE", (24, 24))  # the published one takes half a minute
    report = bench.measure(model, [16, (12, 20)], batch=2, seconds=0.001)
    tasks = [row["task"] for row in report["results"] if row["size"] == [16, 16]]
    assert [t.split(",")[0] for t in tasks] == ["decoding alone"] * 2 + ["end to end"] * 2
    assert len(report["results"]) == 4 + 3 + 2
    assert [row["size"] for row in report["results"][-2:]] == [[24, 24]] * 2  # LIIF of the paper
    assert report["protocol"]["batch"] == 2 and report["machine"]["threads"] >= 1


@torch.no_grad()
def test_the_liif_of_the_paper_renders_its_size_in_both_forms(monkeypatch):
    monkeypatch.setattr(bench, "PAPER_SIZE", (24, 24))
    ours, usual = (render() for render in bench._paper_liif(1, bench.CPU).values())
    assert ours.shape == (1, 3, 24, 24)
    torch.testing.assert_close(ours, usual, rtol=0, atol=bench.AGREEMENT)


def test_the_usual_form_must_agree(monkeypatch):
    model = ArbitraryScaleModel(presets.tiny()).eval()
    right = bench.naive_render
    monkeypatch.setattr(bench, "naive_render", lambda *args: right(*args) + 0.01)
    with pytest.raises(RuntimeError):
        bench.measure(model, [16], seconds=0.001)


def test_memory_that_the_system_does_not_tell_is_none(monkeypatch):
    def refused(*args):
        raise OSError("read-only")

    monkeypatch.setattr(bench.Path, "write_text", refused)
    bench._reset_peak(torch.device("cpu"))
    assert bench._peak(torch.device("meta")) is None
