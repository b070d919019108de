"""What a denoising step costs and what it is worth: distance over seconds, by sampler."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from arbscale.evaluation import sets
from arbscale.evaluation.distances import interval
from arbscale.evaluation.features import Extractor
from arbscale.evaluation.resume import Partial, shared
from arbscale.metrics import frechet_distance
from arbscale.samplers import SAMPLERS

STEPS = (2, 3, 5, 10, 20, 50)


@torch.no_grad()
def evaluate_steps(job: sets.Job, partial: Partial) -> dict:
    """Return `rows`, one for each sampler and number in `STEPS`, and the `ceiling`, if any.

    A row holds the Fréchet distance to the reference at the job's first size, the half-width of its
    interval (`distance_pm`), and the seconds that drawing one latent took: the median over the
    batches, without decoding; on a CPU they are CPU seconds, which other programs do not lengthen.
    All rows start from the same noise. The ceiling is the first stage of as many other real images.
    """
    job, name = replace(job, partial=partial), job.features
    network = sets.extractor(name, job.model.device)
    real = job.real.features(job.sizes[0], network, "reference")
    results = {"rows": []}
    for sampler in SAMPLERS:
        for steps in STEPS:
            sampling = replace(job.sampling, steps=steps, sampler=sampler)
            seen, seconds = _sampled(replace(job, sampling=sampling), network)
            row = {"sampler": sampler, "steps": steps, "seconds": seconds}
            results["rows"].append(row | _distance(seen, real))
    if job.others.count == job.n:
        seen = sets.features_of(job, job.sizes[0], sets.CEILING, {name: network})[name]
        results["ceiling"] = _distance(seen, real)
    return results


def _sampled(job: sets.Job, network: Extractor) -> tuple[Tensor, float]:
    """Return the features (N, D) of the job's images, and the seconds that one latent took."""
    what = f"{job.sampling.sampler}, {job.sampling.steps} steps"
    clock = time.process_time if job.model.device.type == "cpu" else time.perf_counter

    def piece(start: int) -> dict[str, Tensor]:
        started = clock()
        z = job.sample(start)
        seconds = torch.tensor([(clock() - started) / len(z)])
        return {"seen": network(sets.decode(job.model, z, job.sizes[0])), "seconds": seconds}

    def kept(start: int) -> dict[str, Tensor]:
        return job.partial.tensors(f"{what}, {start:06d}", lambda: piece(start))

    parts = shared(kept, range(0, job.n, sets.BATCH), what)
    seen, seconds = (torch.cat([part[key] for part in parts]) for key in ("seen", "seconds"))
    return seen, seconds.median().item()


def _distance(seen: Tensor, real: Tensor) -> dict[str, float]:
    (margin,) = interval(lambda a, b: (frechet_distance(a, b),), seen, real, sets.REPEATS)
    return {"distance": frechet_distance(seen, real), "distance_pm": margin}
