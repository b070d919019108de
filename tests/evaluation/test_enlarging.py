"""Enlarging is timed by steps and precision, beside small tiles."""

import torch

from arbscale import ArbitraryScaleModel, presets
from arbscale.evaluation import enlarging


def test_each_row_is_a_call_that_enlarges(monkeypatch):
    model, calls = ArbitraryScaleModel(presets.tiny(8)).eval(), []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(enlarging, "SIDE", 20)
    original = model.upscale

    def recorded(low, scale, **options):
        calls.append(options)
        return original(low, scale, **options)

    def seconds(call):
        assert call().shape == (3, 40, 40)
        return 0.004 * len(calls)

    model.upscale = recorded
    rows = enlarging.enlarging(model, seconds)
    assert len(rows) == len(calls) == 1 + 2 * len(enlarging.STEPS)
    assert calls[0] == {"steps": 5, "precision": "float32", "tile": 16} and "16" in rows[0]["task"]
    for n, (row, options) in enumerate(zip(rows, calls, strict=True), 1):
        assert abs(row["seconds_per_megapixel"] - 0.004 * n / 0.0016) < 1e-9
        assert str(options["steps"]) in row["task"]
        assert ("bfloat16" in row["task"]) == (options["precision"] == "auto")
