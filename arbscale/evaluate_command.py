"""`python -m arbscale evaluate`: which pictures, which protocol, and where finished pieces lie."""

from __future__ import annotations

import argparse
import time

from arbscale import evaluation, generation, reports
from arbscale.data import ContinuousScenes, open_dataset
from arbscale.features import fingerprint
from arbscale.model import ArbitraryScaleModel, pick_device
from arbscale.protocols import get_protocol
from arbscale.resume import Partial


def evaluate(args: argparse.Namespace) -> None:
    """Score a model beside its baselines on unseen pictures; print a table, write JSON."""
    started = time.perf_counter()
    reports.check_path(args.output)
    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    task = args.task or ("upscale" if model.preset.low_size else "reconstruct")
    usual = "photos" if model.preset.low_size else model.manifest.get("data", "scenes")
    args.data = args.data or usual
    run = _evaluate_generation if task == "generate" else _evaluate_pairs
    try:
        report, partial = run(args, model, task)
    except KeyboardInterrupt:
        kept = (
            "the same command goes on from here" if args.output else "with -o it could be resumed"
        )
        raise RuntimeError(f"stopped; {kept}") from None
    report["timing"] = {"seconds": round(time.perf_counter() - started, 1)}
    reports.publish(report, args.output)
    partial.finish()


def _evaluate_pairs(
    args: argparse.Namespace, model: ArbitraryScaleModel, task: str
) -> tuple[dict, Partial]:
    if task == "upscale" and not model.preset.low_size:
        raise ValueError(f"{args.model} is a generator; take --task reconstruct or generate")
    split = args.split or ("test" if args.data == "scenes" else "val")
    images = open_dataset(args.data, split)
    n = args.number or (32 if args.data == "scenes" else len(images))
    if n > len(images):
        raise ValueError(f"{args.data}, {split} has {len(images)} pictures, fewer than {n}")
    rule, sampling = get_protocol(args.protocol), _sampling(args, task)
    with_lpips = evaluation.lpips_or_why_not()
    choices = evaluation.pair_protocol(rule, images, task, n, sampling, with_lpips)
    report = reports.header(model, task, {"data": args.data, "split": split, **choices})
    partial = _partial(args, report, fingerprint(images))

    def rows(index: int, scale: float) -> evaluation.Rows:
        if task == "reconstruct":
            return evaluation.reconstruction_rows(model, images, index, scale, rule)
        return evaluation.upscaling_rows(model, images[index], scale, rule, sampling, index)

    report["results"] = evaluation.evaluate_pairs(rows, rule, args.scales, n, partial, with_lpips)
    return report, partial


def _evaluate_generation(
    args: argparse.Namespace, model: ArbitraryScaleModel, task: str
) -> tuple[dict, Partial]:
    if model.preset.low_size:
        raise ValueError(f"{args.model} is a super-resolution model; take --task upscale")
    n = args.number or 1000
    split = args.split or "train"
    others = "test" if split != "test" else "train"
    if args.data == "scenes":  # there are as many as are asked for
        real, unseen = (ContinuousScenes(n, split=s) for s in (split, others))
    else:
        real, unseen = (open_dataset(args.data, s) for s in (split, others))
    side = model.preset.image_size
    job = generation.Job(
        model,
        generation.RealPictures(real, min(n, len(real))),
        generation.RealPictures(unseen, min(n, len(unseen))),
        tuple(args.sizes or [(side, side), (2 * side, 2 * side)]),
        n,
        args.features,
        _sampling(args, task),
    )
    generation.check(job, args.allow_few)
    choices = {"data": args.data, "split": split, "others' split": others}
    report = reports.header(model, task, choices | generation.protocol(job))
    partial = _partial(args, report, fingerprint(real) + fingerprint(unseen))
    report["results"] = generation.evaluate_generation(job, partial)
    return report, partial


def _sampling(args: argparse.Namespace, task: str) -> evaluation.Sampling:
    steps = args.steps or (10 if task == "upscale" else 20)
    return evaluation.Sampling(args.sampler, steps, args.seed)


def _partial(args: argparse.Namespace, report: dict, pictures: str) -> Partial:
    """Keep finished pieces beside the output, for this report and these pictures alone."""
    folder = args.output and args.output.with_suffix(".partial")
    return Partial(folder, {**report, "command": None, "fingerprint": pictures})
