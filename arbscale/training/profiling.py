"""Where a training's time goes: how fast data come, how fast they are used, what a step does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from arbscale.model import ArbitraryScaleModel
from arbscale.presets import build_decoder
from arbscale.training.denoiser import AlignmentStage, DiffusionStage
from arbscale.training.draws import loader
from arbscale.training.first_stage import AutoencoderStage, DecoderStage
from arbscale.training.loop import Run, Stage, optimise
from arbscale.training.runlog import read_log
from arbscale.training.sources import Source

STEPS = 20  # timed, after WARM_UP others
WARM_UP = 5
POOL = 256  # latents are as fast to look up among few as among many


def profile(model: ArbitraryScaleModel, source: Source, run: Run) -> Iterator[tuple[str, str]]:
    """Measure each stage; yield a line of its rates and a table of one step's operations.

    The rates are images loaded and images trained on per second, and the share of a step in which
    the network waits for data. The model is trained by some steps.
    """
    preset, first_stage = model.preset, model.first_stage
    stages = (
        lambda: AutoencoderStage(
            first_stage.encoder, build_decoder(preset).to(model.device), source, preset
        ),
        lambda: DecoderStage(first_stage, source, preset, True),
        lambda: DiffusionStage(model, source, POOL),
        lambda: AlignmentStage(model, source, None),
    )
    for build in stages:
        stage = build()
        with tempfile.TemporaryDirectory() as folder:
            training, waiting = _train(stage, replace(run, folder=Path(folder), latents=None))
        yield (
            f"{stage.name:12} loading {_load(stage, run):8.1f} /s   training {training:8.1f} /s"
            f"   waiting for data {waiting:6.1%} of a step",
            f"{stage.name}, one step\n{_one_step(stage)}",
        )


def _train(stage: Stage, run: Run) -> tuple[float, float]:
    """Return images per second, and the share of the time spent waiting for them."""
    run = replace(run, resume=False, log_every=1, sample_every=0, save_every=10**9)
    optimise(stage, WARM_UP + STEPS, run=run)
    lines = read_log(run.folder)[WARM_UP:]
    seconds = sorted(line["seconds"] for line in lines)
    waiting = sum(line["waiting"] * line["seconds"] for line in lines)
    return stage.batch / seconds[STEPS // 2], waiting / sum(seconds)


def _load(stage: Stage, run: Run) -> float:
    """Return images per second."""
    batches = iter(loader(stage, range(WARM_UP + STEPS), 0, workers=run.workers))
    for _ in range(WARM_UP):
        next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return stage.batch * STEPS / (time.perf_counter() - started)


def _one_step(stage: Stage) -> str:
    device = next(stage.parameters()).device
    tensors = next(iter(loader(stage, range(1), 0)))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        stage(**{k: v.to(device) for k, v in tensors.items()}).backward()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40)
