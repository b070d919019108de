"""Trains heads of the decoder side by side on a shipped encoder: writes data/FAMILY/heads.json.

    python data/heads.py cats           run in the root of the checkout; an hour of one thread
    python data/heads.py photos 2000    2,000 steps each, not 500; half an hour

Every head begins with a new decoder of the same weights and sees the same images and points.
ARBSCALE_DATA names the folder of afhq_cats256 or sr, ARBSCALE_WEIGHTS that of AlexNet, for LPIPS.
Rerun the same command to resume; if all is finished, only the timing is measured again.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arbscale import store, training
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

RUNS = Path("runs/heads")
HEADS = {
    "LIIF, four neighbours": {"head": "liif"},
    "LIIF, the nearest alone": {"head": "liif", "local_ensemble": False},
} | {f"interpolated, {n} x {n}": {"head": "interpolated", "finer": n} for n in (1, 2, 4)}
"""By name: the fields of the preset. n x n features a latent pixel, three layers of 96."""
HEADS |= {
    f"interpolated, 2 x 2, {depth} x {width}": HEADS["interpolated, 2 x 2"]
    | {"hidden": (width,) * depth}
    for depth, width in ((1, 96), (2, 96), (3, 48), (3, 64))
}


@dataclass(frozen=True)
class Arena:
    """What the heads of a family learn from, and are measured on."""

    data: str
    whole: bool  # images, or crops
    rule: str  # protocol
    number: int  # of the validation images
    scales: tuple[float, ...]
    heads: tuple[str, ...]


ARENAS = {
    "cats": Arena("afhq_cats256", True, "faces_128", 100, (0.5, 1, 1.5625, 2), tuple(HEADS)),
    "photos": Arena(
        "sr", False, "whole", 34, (1, 2, 4, 8), ("LIIF, four neighbours", "interpolated, 2 x 2")
    ),
}


def trained(
    base: ArbitraryScaleModel, arena: Arena, fields: dict, steps: int
) -> ArbitraryScaleModel:
    """Return a model with the encoder of `base`, and a decoder and a head of its own."""
    torch.manual_seed(0)
    model = ArbitraryScaleModel(replace(base.preset, **fields)).to(base.device)
    model.first_stage.encoder.load_state_dict(base.first_stage.encoder.state_dict())
    images = open_dataset(arena.data, "train")
    if arena.whole:
        source = training.whole_source(images)
    else:
        source = training.photo_source(images, base.preset)
    begun = store.content_key(base.manifest["files"])[:8]
    folder = RUNS / base.preset.name / f"{'-'.join(map(str, fields.values()))}-{steps}-{begun}"
    run = training.Run(folder, True, save_every=100, keep=1, sample_every=0, precision="bf16")
    training.train_decoder(model.first_stage, source, model.preset, steps, run=run)
    return model.eval().requires_grad_(False)


def seam(image: Tensor, side: int) -> float:
    """Return the mean step across borders of latent pixels `side` wide, over that elsewhere."""
    steps = image.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # between columns x and x + 1
    border = (torch.arange(len(steps)) + 1) % side == 0
    return (steps[border].mean() / steps[~border].mean()).item()


def measured(model: ArbitraryScaleModel, arena: Arena, facts: dict) -> dict:
    """Return a head's parameters, its milliseconds by size, its scores by scale, and its seam."""
    head, rule = model.first_stage.liif, get_protocol(arena.rule)
    images = open_dataset(arena.data, "val")
    features = torch.zeros(1, head.in_channels, 16, 16, device=model.device)

    def rows(index: int, scale: float) -> dict:
        found = reconstruction_rows(model, images, index, scale, rule)
        return {method: found[method] for method in ("truth", "ours (first stage)")}

    def seams_of(count: int = 30) -> dict[str, float]:
        side, images = 2 * model.first_stage.factor, [rows(i, 2) for i in range(count)]
        methods = {"ours": "ours (first stage)", "ground truth": "truth"}
        return {
            name: sum(seam(x[method], side) for x in images) / count
            for name, method in methods.items()
        }

    kept = Partial(RUNS / "scores", facts)
    scores = evaluate_pairs(rows, rule, arena.scales, arena.number, kept, with_lpips=True)
    speeds = {
        side: bench.images_per_second(partial(head.render, features, side), device=model.device)
        for side in bench.SIDES
    }
    return {
        "parameters": sum(p.numel() for p in head.parameters()),
        "ms": {side: 1000 * speed.seconds for side, speed in speeds.items()},
        "scores": {scale: found["ours (first stage)"] for scale, found in scores.items()},
        "seam": kept.numbers("seam", seams_of),
    }


def main(family: str, steps: int = 500) -> None:
    """Train, measure, write and print."""
    base, arena = ArbitraryScaleModel.load(family).to(pick_device()), ARENAS[family]
    rule = get_protocol(arena.rule)
    how = pairs.pair_protocol(rule, [], "reconstruct", arena.number, Sampling(), lpips=True)
    facts = {"data": arena.data, "split": "val", "steps": steps, **how}
    report = reports.header(base, "heads", facts)
    report["command"] = " ".join(["python data/heads.py", *sys.argv[1:]])
    models = {name: trained(base, arena, HEADS[name], steps) for name in arena.heads}
    facts = {"weights": report["weights"], "protocol": report["protocol"]}
    report["results"] = {
        name: measured(model, arena, {**facts, "head": name}) for name, model in models.items()
    }
    reports.write(report, Path("data") / family / "heads.json")
    print(reports.table(report))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
