"""Fine-tunes the denoiser of `cats` with and without the image term: data/cats/alignment.json.

    python data/alignment.py         run in the root of the checkout; half an hour of one thread
    python data/alignment.py 1000    with that many steps for each of the six runs

Aligned run and control of a seed see the same images, steps and noise, so their difference is the
effect of the image term. ARBSCALE_DATA names the folder of afhq_cats256. Rerun the same command to
resume.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arbscale import store, training
from arbscale.data import open_dataset, resize
from arbscale.diffusion import alignment_loss
from arbscale.evaluation import reports
from arbscale.model import ArbitraryScaleModel
from arbscale.unet import pick_device

DATA, NUMBER = "afhq_cats256", 64  # images of the validation split, on which errors are measured
RUNS = Path("runs/alignment")
TIMES = (20, 60, 120, 200, 300, 450, 600, 800)
SEEDS = (1, 2, 3)
WEIGHTS = {"control": 0.0, "aligned": 5.0}  # the image term's w(t) is at most that


def finetuned(seed: int, weight: float, steps: int) -> ArbitraryScaleModel:
    """Return the shipped model after `steps` more of its denoiser."""
    model = ArbitraryScaleModel.load("cats").to(pick_device())
    source = training.whole_source(open_dataset(DATA, "train"))
    begun = store.content_key(model.manifest["files"])[:8]
    folder = RUNS / f"{seed}-{weight:g}-{steps}-{begun}"
    run = training.Run(folder, True, save_every=20, keep=1, sample_every=0, precision="bf16")
    training.finetune_alignment(model, source, steps, seed, weight, run)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def errors(model: ArbitraryScaleModel, images: Tensor, noise: Tensor) -> dict[str, list[float]]:
    """Return the noise's and the image's mean squared error at each of `TIMES`."""
    z0 = model.first_stage.encode(images) * model.scale_factor

    def decode(z: Tensor) -> Tensor:
        return model.first_stage.decode(z / model.scale_factor, images.shape[-2:])

    found: dict[str, list[float]] = {"noise": [], "image": []}
    for time in tqdm(TIMES, desc="errors", unit="step"):
        t = torch.full((len(images),), time, device=images.device)
        latent, image = alignment_loss(
            model.denoise(), decode, z0, images, t, noise, model.schedule
        )
        found["noise"].append(latent.mean().item())
        found["image"].append((image.mean() / model.schedule.weight(t[:1]).to(image)).item())
    return found


def main(steps: int = 400) -> None:
    """Train, measure, write and print."""
    base = ArbitraryScaleModel.load("cats").to(pick_device())
    held = open_dataset(DATA, "val")
    side = base.preset.image_size
    images = torch.stack([resize(held[i], side) for i in range(NUMBER)]).to(base.device)
    shape = (NUMBER, base.preset.latent_channels, *(base.preset.latent_size,) * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(base.device)
    facts = {"data": DATA, "split": "val", "pictures": NUMBER, "steps": steps, "times": TIMES}
    report = reports.header(base, "alignment", facts)
    report["command"] = " ".join(["python data/alignment.py", *sys.argv[1:]])
    report["results"] = {"before": errors(base, images, noise)}
    for seed in SEEDS:
        for name, weight in WEIGHTS.items():
            model = finetuned(seed, weight, steps)
            report["results"][f"{name}, seed {seed}"] = errors(model, images, noise)
    reports.write(report, Path("data/cats/alignment.json"))
    print(reports.table(report))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
