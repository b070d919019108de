"""A run that is killed at any moment ends, resumed, in the weights of one that was not.

The file is also the program that it kills: `python tests/training/test_survival.py FOLDER` trains a
miniature through all stages again and again, each time in a forked child (a fresh interpreter would
take seconds) that dies at a random point, and prints what it saw as JSON.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

KILLS = 21  # besides those that come soon after a resumption


def train(folder: Path) -> str:
    """All four stages with checkpoints in `folder`; return a hash of what was learned."""
    import torch

    from arbscale import presets, store, training
    from arbscale.model import ArbitraryScaleModel

    torch.manual_seed(0)
    preset = replace(
        presets.tiny(4),
        image_size=8,
        target_sizes=(4, 8),
        hidden=(16,),
        first_stage_batch=2,
        diffusion_batch=2,
    )
    model = ArbitraryScaleModel(preset)
    source = training.scene_source(count=50)
    run = training.Run(folder, resume=True, save_every=2, keep=2, log_every=1, sample_every=0)
    losses = training.train_first_stage(model, source, 3, 5, run=run)
    losses += training.train_diffusion(model, source, 5, pool=4, run=run)
    losses += training.finetune_alignment(model, source, 3, run=run)
    return store.content_key(losses, model.scale_factor, module=model)


def dying(at: int | None):
    """Count the moments that matter to a file; at the given one the process is gone."""
    import torch
    from safetensors import torch as safetensors

    from arbscale.training import checkpoints

    passed = 0

    def counted(call, halfway=None):
        def inner(*words, **options):
            nonlocal passed
            passed += 1
            if passed == at:
                if halfway:
                    halfway(*words)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **options)

        return inner

    def half(tensors, path):
        content = safetensors.save(tensors)
        Path(path).write_bytes(content[: len(content) // 2])

    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoints.save_file = counted(checkpoints.save_file, half)
    torch.optim.Adam.step = counted(torch.optim.Adam.step)
    return lambda: passed


def in_a_child(folder: Path, at: int | None = None, after: float | None = None) -> dict:
    """Train in a fork; kill it at moment `at`, or from outside after some seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            passed = dying(at)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                done = {"weights": train(folder)}
            done |= {"moments": passed(), "warned": [str(w.message) for w in warned]}
            os.write(writing, json.dumps(done).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return {"killed": True}
    if status:
        raise RuntimeError(f"the training itself failed: status {status}")
    return {"killed": False, **json.loads(said)}


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    train(folder / "warm")  # imports everything
    started = time.perf_counter()
    whole = in_a_child(folder / "whole")
    seconds = time.perf_counter() - started
    draw = random.Random(0)
    moments = sorted(draw.sample(range(1, whole["moments"] + 1), KILLS))
    report = {"whole": whole["weights"], "ends": [], "kills": 0}
    for number, moment in enumerate(moments):
        place = folder / f"kill-{number}"
        if number % 4 == 3:  # from outside, by the clock
            killed = in_a_child(place, after=draw.uniform(0.1, 0.9) * seconds)["killed"]
        else:
            killed = in_a_child(place, at=moment)["killed"]
        if number % 5 == 0:  # and once more, soon after it went on
            killed += in_a_child(place, at=draw.randint(1, 12))["killed"]
        report["kills"] += killed
        report["ends"].append(in_a_child(place)["weights"])
    print(json.dumps(report))


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_in_the_same_weights(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 20
    assert len(report["ends"]) == KILLS and set(report["ends"]) == {report["whole"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
