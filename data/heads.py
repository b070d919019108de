"""Trains heads of the decoder side by side on a shipped encoder: writes data/FAMILY/heads.json.

    python data/heads.py cats           500 steps each; an hour of one thread
    python data/heads.py photos 4000    equal time, that of 4,000 steps of the first; 2.5 hours

Run it in the root of the checkout. Every head begins with a new decoder of the same weights and
sees the same images and points, step by step.
ARBSCALE_DATA names the folder of afhq_cats256 or sr, ARBSCALE_WEIGHTS that of AlexNet, for LPIPS.
Rerun the same command to resume; if all is finished, only the timing is measured again.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from arbscale.training.runlog import read_log
from arbscale.unet import pick_device, pick_precision

RUNS = Path("runs/heads")
TIMED = 40  # steps by which the time of a step is measured, after WARM_UP others
WARM_UP = 5
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
    equal_time: bool = False  # or equal steps


ARENAS = {
    "cats": Arena("afhq_cats256", True, "faces_128", 100, (0.5, 1, 1.5625, 2), tuple(HEADS)),
    "photos": Arena(
        "sr",
        False,
        "whole",
        34,
        (1, 2, 4, 8),
        ("LIIF, four neighbours", "interpolated, 2 x 2"),
        equal_time=True,
    ),
}


class Trainer:
    """Trains heads on the frozen encoder of a shipped model."""

    def __init__(self, base: ArbitraryScaleModel, arena: Arena):
        self.base, self.arena = base, arena
        fast = pick_precision("auto", base.device) != torch.float32
        self.precision = "bf16" if fast else "no"
        begun = store.content_key(base.manifest["files"])[:8]
        self.folder = RUNS / base.preset.name / begun

    def train(self, fields: dict, steps: int, **options: Any) -> ArbitraryScaleModel:
        """Return a model with the encoder of the base, and a decoder and a head of its own."""
        base = self.base
        torch.manual_seed(0)
        model = ArbitraryScaleModel(replace(base.preset, **fields)).to(base.device)
        model.first_stage.encoder.load_state_dict(base.first_stage.encoder.state_dict())
        images = open_dataset(self.arena.data, "train")
        if self.arena.whole:
            source = training.whole_source(images)
        else:
            source = training.photo_source(images, base.preset)
        options = {"folder": self.named(fields, steps), "resume": True, "keep": 1} | options
        run = training.Run(save_every=100, sample_every=0, precision=self.precision, **options)
        training.train_decoder(model.first_stage, source, model.preset, steps, run=run)
        return model.eval().requires_grad_(False)

    def named(self, fields: dict, steps: int) -> Path:
        """Return the folder of a run."""
        return self.folder / f"{'-'.join(map(str, fields.values()))}-{steps}"

    def step_seconds(self, fields: dict) -> float:
        """Return the mean time of a training step; every head is timed on the same steps."""

        def timed() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                self.train(fields, WARM_UP + TIMED, folder=Path(folder), log_every=1)
                lines = read_log(Path(folder))[WARM_UP:]
            return {"seconds": sum(line["seconds"] for line in lines) / len(lines)}

        kept = Partial(self.folder / "times", {"precision": self.precision})
        return kept.numbers("-".join(map(str, fields.values())), timed)["seconds"]

    def steps(self, steps: int) -> dict[str, int]:
        """Return the steps of each head: as many, or as many as take the same time."""
        heads = self.arena.heads
        if not self.arena.equal_time:
            return dict.fromkeys(heads, steps)
        seconds = {name: self.step_seconds(HEADS[name]) for name in heads}
        return {name: round(steps * seconds[heads[0]] / seconds[name]) for name in heads}


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
    trainer = Trainer(base, arena)
    counts = trainer.steps(steps)
    facts = {"data": arena.data, "split": "val", "steps": counts, "precision": trainer.precision}
    facts |= how
    report = reports.header(base, "heads", facts)
    report["command"] = " ".join(["python data/heads.py", *sys.argv[1:]])
    models = {name: trainer.train(HEADS[name], count) for name, count in counts.items()}
    facts = {"weights": report["weights"], "protocol": report["protocol"]}
    report["results"] = {
        name: measured(model, arena, {**facts, "head": name}) for name, model in models.items()
    }
    reports.write(report, Path("data") / family / "heads.json")
    print(reports.table(report))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
