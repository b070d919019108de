"""Trains heads of the decoder side by side on the encoder of `cats`: writes data/cats/heads.json.

    python data/heads.py         in a folder above data/; half an hour of one CPU thread
    python data/heads.py 2000    with that many steps each

Every head begins with a new decoder of the same weights and sees the same images and points.
ARBSCALE_DATA names the folder of afhq_cats256, ARBSCALE_WEIGHTS that of AlexNet, for LPIPS. Rerun
the same command to resume; a finished comparison repeats its timing alone.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from arbscale import training
from arbscale.data import open_dataset
from arbscale.evaluation import (
    Partial,
    bench,
    evaluate_pairs,
    get_protocol,
    pairs,
    reconstruction_rows,
    reports,
)
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import Sampling
from arbscale.unet import pick_device

DATA, SPLIT, NUMBER = "afhq_cats256", "val", 100
SCALES = (0.5, 1, 1.5625, 2)  # of 128 px
RUNS = Path("runs/heads")
HEADS = {
    "LIIF, four neighbours": {"head": "liif"},
    "LIIF, the nearest alone": {"head": "liif", "local_ensemble": False},
} | {f"interpolated, {n} x {n}": {"head": "interpolated", "finer": n} for n in (1, 2, 4)}
"""By name: the fields of the preset. n x n features a latent pixel."""


def trained(base: ArbitraryScaleModel, fields: dict, steps: int) -> ArbitraryScaleModel:
    """Return a model with the encoder of `base`, and a decoder and a head of its own."""
    torch.manual_seed(0)
    model = ArbitraryScaleModel(replace(base.preset, **fields)).to(base.device)
    model.first_stage.encoder.load_state_dict(base.first_stage.encoder.state_dict())
    source = training.whole_source(open_dataset(DATA, "train"))
    folder = RUNS / f"{'-'.join(map(str, fields.values()))}-{steps}"
    run = training.Run(folder, True, save_every=100, keep=1, sample_every=0, precision="bf16")
    training.train_decoder(model.first_stage, source, model.preset, steps, run=run)
    return model.eval().requires_grad_(False)


def measured(model: ArbitraryScaleModel, facts: dict) -> dict:
    """Return the parameters of a head, its milliseconds by size, and its scores by scale."""
    head, rule, images = (
        model.first_stage.liif,
        get_protocol("faces_128"),
        open_dataset(DATA, SPLIT),
    )
    features = torch.zeros(1, head.in_channels, 16, 16, device=model.device)

    def rows(index: int, scale: float) -> dict:
        found = reconstruction_rows(model, images, index, scale, rule)
        return {method: found[method] for method in ("truth", "ours (first stage)")}

    kept = Partial(RUNS / "scores", facts)
    scores = evaluate_pairs(rows, rule, SCALES, NUMBER, kept, with_lpips=True)
    speeds = {
        side: bench.images_per_second(partial(head.render, features, side), device=model.device)
        for side in bench.SIDES
    }
    return {
        "parameters": sum(p.numel() for p in head.parameters()),
        "ms": {side: 1000 * speed.seconds for side, speed in speeds.items()},
        "scores": {scale: found["ours (first stage)"] for scale, found in scores.items()},
    }


def main(steps: int = 500) -> None:
    """Train, measure, write and print."""
    base = ArbitraryScaleModel.load("cats").to(pick_device())
    how = pairs.pair_protocol(
        get_protocol("faces_128"), [], "reconstruct", NUMBER, Sampling(), lpips=True
    )
    report = reports.header(base, "heads", {"data": DATA, "split": SPLIT, "steps": steps, **how})
    report["command"] = " ".join(["python data/heads.py", *sys.argv[1:]])
    models = {name: trained(base, fields, steps) for name, fields in HEADS.items()}
    facts = {"weights": report["weights"], "protocol": report["protocol"]}
    report["results"] = {
        name: measured(model, {**facts, "head": name}) for name, model in models.items()
    }
    reports.write(report, Path("data/cats/heads.json"))
    print(reports.table(report))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
