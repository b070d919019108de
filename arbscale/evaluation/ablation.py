"""What a transformer buys: denoisers of equal cost, trained and measured alike.

Every contestant sees the same latents, batches, times and noise of a seed; costs are counted, not
tuned. Each piece of work is a folder or a file named after all that it depends on, so a stopped
comparison can be resumed, and a changed one repeats only what has changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm.auto import tqdm
from tyro.conf import arg

from arbscale import presets
from arbscale.data import open_dataset
from arbscale.diffusion import denoising_loss
from arbscale.evaluation.bench import images_per_second
from arbscale.evaluation.features import extractor, fingerprint
from arbscale.evaluation.reports import header
from arbscale.evaluation.resume import Partial
from arbscale.evaluation.sets import BATCH, RealPictures, batch_starts
from arbscale.metrics import frechet_distance, precision_recall
from arbscale.model import ArbitraryScaleModel
from arbscale.presets import Preset
from arbscale.store import InputError, content_key
from arbscale.unet import pick_device

FIRST_STAGES = {"scenes": ("scenes", "scenes"), "cats": ("cats", "afhq_cats256")}
"""By data: the shipped model whose first stage all contestants share, and the data set's name."""

TIMES = 10  # steps at which the held-out loss is measured, evenly spaced
SAMPLING_STEPS, SAMPLER = 20, "dpm_solver_pp"

_SHARED = {"unet_channels": 64, "head_channels": 32, "transformer_width": 160, "merge": 2}
_SHARED |= {"transformer_blocks": 6, "diffusion_batch": 16, "diffusion_lr": 1e-3}
_UNET = _SHARED | {"denoiser": "unet"}
_UNET |= {"unet_multipliers": (1, 2), "unet_blocks": 1, "unet_attention_levels": (1,)}
_MIXED = _SHARED | {"denoiser": "unet_transformer"}  # the transformer in place of the second level
_MIXED |= {"unet_multipliers": (1,), "unet_blocks": 2, "unet_attention_levels": ()}
_ALONE = _UNET | {"denoiser": "transformer"}

CONTESTANTS: dict[str, dict] = {
    "unet": _UNET,
    "unet_transformer": _MIXED,
    "transformer": _ALONE | {"transformer_width": 192, "transformer_blocks": 8},
    "transformer_light": _ALONE | {"transformer_blocks": 8},
}
"""By name: the fields of a preset that make the denoiser and its training."""

EQUAL_COMPUTE = ("unet", "unet_transformer", "transformer")
EQUAL_PARAMETERS = ("unet", "unet_transformer", "transformer_light")
COMPARISONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scenes, equal compute": ("scenes", EQUAL_COMPUTE),
    "scenes, equal parameters": ("scenes", EQUAL_PARAMETERS),
    "cats, equal compute": ("cats", ("unet", "unet_transformer")),
}
"""By title: the data, and the contestants of which the first is what the others are held against.

Equal is within three percent, of multiply-adds or of parameters. The U-Net with a transformer is
equal to the plain one in both.
"""


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with."""

    comparisons: Annotated[tuple[str, ...], arg(name="compare")] = tuple(COMPARISONS)  # titles
    seeds: int = 3  # runs of each contestant
    steps: int = 500  # of each run
    pool: int = 4096  # images encoded for each run
    number: Annotated[int, arg(aliases=["-n"])] = 256  # of images held out, real and generated
    features: str = "encoder"  # of the distances, as for evaluate

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be compared."""
        if unknown := [name for name in self.comparisons if name not in COMPARISONS]:
            raise InputError(f"no comparison {unknown[0]!r}; there are: {'; '.join(COMPARISONS)}")
        if min(self.seeds, self.steps, self.pool - 1) < 1:
            raise InputError(f"seeds and steps are at least 1 and the pool 2, got {self}")


def ablate(settings: Settings, folder: Path) -> dict:
    """Train and measure every contestant; return a report that JSON can hold.

    What is finished is kept in `folder`, from which a stopped comparison resumes.

    Its `results` are `costs` by data and contestant, `runs` (one per data set, contestant and
    seed), and `floors`: the distance of held-out real images from the reference, by data.
    """
    partial = Partial(folder, {"task": "ablate"})
    wanted = {}  # each contestant once per data set, even where two comparisons share it
    for title in settings.comparisons:
        data, names = COMPARISONS[title]
        wanted.setdefault(data, {}).update(dict.fromkeys(names))
    total = settings.seeds * sum(len(names) for names in wanted.values())
    arenas = {data: _Arena(data, settings, partial) for data in wanted}  # what lacks shows now
    costs, runs, floors = {}, [], {}
    for data, arena in arenas.items():
        floors[data] = arena.compare(arena.features(arena.held_out, "held out"))
        costs[data] = {name: arena.cost(name) for name in wanted[data]}
        for seed in range(settings.seeds):  # a stopped comparison has whole rounds
            for name in wanted[data]:
                print(f"run {len(runs) + 1} of {total}: {data}, {name}, seed {seed}")
                runs.append(arena.run(name, seed))
    protocol = {
        **asdict(settings),
        "latents": {data: arena.facts for data, arena in arenas.items()},
        "comparisons": {title: COMPARISONS[title] for title in settings.comparisons},
        "contestants": {name: CONTESTANTS[name] for names in wanted.values() for name in names},
        "held-out loss": f"mean squared error of the noise at {TIMES} evenly spaced steps, test "
        "split, the same noise for all",
        "drawn by": f"{SAMPLER}, {SAMPLING_STEPS} steps, against the first of the train split",
        "distance over": extractor(settings.features).label,
    }
    results = {"costs": costs, "runs": runs, "floors": floors}
    return {**header(arenas[next(iter(arenas))].base, "ablate", protocol), "results": results}


class _Arena:
    """One data set's latents and images, where contestants meet."""

    def __init__(self, data: str, settings: Settings, partial: Partial):
        from arbscale import training  # it loads the compiler, for seconds

        self.data, self.settings, self.partial = data, settings, partial
        self.device = pick_device()
        shipped, name = FIRST_STAGES[data]
        self.base = ArbitraryScaleModel.load(shipped).to(self.device)
        self.size = (self.base.preset.image_size,) * 2
        train, test = (open_dataset(name, split) for split in ("train", "test"))
        scenes = data == "scenes"
        self.source = training.scene_source() if scenes else training.whole_source(train)
        if settings.number > (most := min(len(train), len(test))):  # distances depend on it
            raise InputError(f"{name} has {most} images to compare; take --number {most} or less")
        self.real, self.held_out = (RealPictures(x, settings.number) for x in (train, test))
        self.network = extractor(settings.features, self.device)
        facts = fingerprint(train), fingerprint(test)
        self.key = content_key(*facts, module=self.base.first_stage)

    @property
    def facts(self) -> dict:
        """What the latents are, as JSON."""
        shipped, name = FIRST_STAGES[self.data]
        weights = [entry["sha256"] for entry in self.base.manifest["files"]]
        return {"model": shipped, "weights": weights, "images": name}

    def preset(self, name: str) -> Preset:
        """Return a contestant's preset."""
        plain = {"low_size": None, "guide_multipliers": ()}
        return replace(self.base.preset, name=name, **plain, **CONTESTANTS[name])

    def cost(self, name: str) -> dict:
        """Return what a contestant costs."""
        preset = self.preset(name)
        piece = f"cost-{name}-{_digest(preset.to_dict(), str(self.device))}"
        return self.partial.numbers(piece, lambda: cost(preset, self.device))

    def run(self, name: str, seed: int) -> dict:
        """Train a contestant, and measure it."""
        settings, preset = self.settings, self.preset(name)
        facts = preset.to_dict(), self.key, settings.steps, settings.pool
        folder = f"{self.data}-{name}-{seed}-{_digest(*facts)}"
        piece = f"{folder}-{_digest(settings.number, settings.features, TIMES, SAMPLING_STEPS)}"

        def measured() -> dict:
            return self._measure(*self._train(preset, seed, folder), seed)

        told = {"data": self.data, "contestant": name, "seed": seed}
        return told | self.partial.numbers(piece, measured)

    def compare(self, features: Tensor) -> dict:
        """Return distance, precision and recall of generated images' features (N, D)."""
        real = self.features(self.real, "reference")
        precision, recall = precision_recall(features, real)
        distance = frechet_distance(features, real)
        return {"distance": distance, "precision": precision, "recall": recall}

    def features(self, images: RealPictures, what: str) -> Tensor:
        """Return the features (N, D) of real images at the training size."""
        return images.features(self.size, self.network, what)

    def _train(
        self, preset: Preset, seed: int, folder: str
    ) -> tuple[ArbitraryScaleModel, list[float]]:
        from arbscale import training

        torch.manual_seed(seed)
        model = ArbitraryScaleModel(preset).to(self.device)
        model.first_stage.load_state_dict(self.base.first_stage.state_dict())
        run = training.Run(
            folder=self.partial.folder / folder,
            resume=True,
            save_every=200,
            keep=1,
            sample_every=0,
            latents=self.partial.folder / f"latents-{self.data}-{seed}",
        )
        steps, pool = self.settings.steps, self.settings.pool
        losses = training.train_diffusion(model, self.source, steps, seed, pool, run)
        return model.eval(), losses

    @torch.no_grad()
    def _measure(self, model: ArbitraryScaleModel, losses: list[float], seed: int) -> dict:
        z, features, n = [], [], self.settings.number
        for start in batch_starts(self.held_out.count, "encoding"):
            images = self.held_out.batch(start, self.size)
            z.append(model.first_stage.encode(images.to(self.device)))
        for start in batch_starts(n, "sampling"):
            count = min(BATCH, n - start)
            drawn = model.sample(count, 100_000 * seed + start, SAMPLING_STEPS, SAMPLER, guidance=1)
            features.append(self.network(model.decode(drawn, self.size)))
        by_time = held_out_loss(model, torch.cat(z) * model.scale_factor)
        return {
            "training loss": sum(losses[-100:]) / len(losses[-100:]),
            "loss": sum(by_time) / TIMES,
            "losses": by_time,
            **self.compare(torch.cat(features)),
        }


@torch.no_grad()
def held_out_loss(model: ArbitraryScaleModel, z0: Tensor, batch: int = 64) -> list[float]:
    """Return the mean squared error of the noise at each of `TIMES` evenly spaced steps.

    Takes scaled latents (N, c, h, w). The noise is a function of the step alone, so that every
    model meets the same.
    """
    values = []
    for k in tqdm(range(TIMES), desc="held-out loss", unit="time"):
        noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(k)).to(z0)
        t = torch.full((len(z0),), int((k + 0.5) * model.schedule.steps / TIMES), device=z0.device)
        parts = zip(z0.split(batch), t.split(batch), noise.split(batch), strict=True)
        losses = [denoising_loss(model.denoise(), *part, model.schedule) for part in parts]
        values.append(torch.cat(losses).cpu().double().mean().item())
    return values


def cost(preset: Preset, device: torch.device, seconds: float = 5.0) -> dict:
    """Return parameters, multiply-adds per latent, and time and memory of a training step.

    Multiply-adds are those of matrix products, convolutions and attention, forward. Memory is what
    a step keeps for its backward pass, and the highest use as `bench` measures it.
    """
    shape = (preset.latent_channels, preset.latent_size, preset.latent_size)
    denoiser = presets.build_denoiser(preset).to(device)
    optimiser = torch.optim.Adam(denoiser.parameters())
    z = torch.zeros(preset.diffusion_batch, *shape, device=device)
    t = torch.zeros(preset.diffusion_batch, dtype=torch.long, device=device)

    def step() -> None:
        optimiser.zero_grad()
        denoiser(z, t).square().mean().backward()
        optimiser.step()

    kept: dict[int, int] = {}  # bytes by address

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = denoiser(z, t)  # holds what is kept, so that no address is used twice
    for parameter in denoiser.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    speed = images_per_second(step, preset.diffusion_batch, seconds, device)
    return {
        **count(preset),
        "milliseconds": 1000 * speed.seconds,
        "kept_megabytes": sum(kept.values()) / 1e6,
        "peak_megabytes": speed.peak_megabytes,
    }


def count(preset: Preset) -> dict[str, int]:
    """Return parameters and multiply-adds per latent; nothing is computed for them."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = (1, preset.latent_channels, preset.latent_size, preset.latent_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        denoiser = presets.build_denoiser(preset)
        denoiser(torch.zeros(shape), torch.zeros(1, dtype=torch.long))
    parameters = sum(p.numel() for p in denoiser.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def _digest(*facts: object) -> str:
    return content_key(*facts)[:8]
