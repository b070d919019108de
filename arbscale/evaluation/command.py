"""The commands that measure: `python -m arbscale evaluate / table / bench / ablate`."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from torch import Tensor
from tyro.conf import Positional, arg

from arbscale import evaluation, store
from arbscale.coords import Size
from arbscale.data.folders import image_name
from arbscale.evaluation import Partial, ablation, get_protocol, reports, sets
from arbscale.evaluation import bench as benchmark
from arbscale.evaluation.features import fingerprint
from arbscale.evaluation.resume import wait_for_all
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import SAMPLERS, UPSCALING, Sampling
from arbscale.store import InputError
from arbscale.unet import launched, pick_device, pick_precision

MAX_BATCH = 100_000  # of bench
BENCH_SIZES = ((64, 64), (128, 128), (256, 256))
DRAWN = "time and memory over the size are drawn beside it as PNG"
MAX_NUMBER = 1_000_000  # of images to evaluate, whose features are held in memory
MAX_SCALE = 64  # of evaluate; LPIPS of larger images would not fit into memory
Output = Annotated[Path | None, arg(aliases=["-o"])]

ARITHMETIC = 3
"""Part of what names finished pieces; one more for each change of the code that changes numbers."""


@dataclass(frozen=True)
class Options:
    """What is measured, on which images, and how."""

    model: Positional[str]  # name or folder
    task: Literal["reconstruct", "upscale", "generate", "steps"] | None = None
    """default: upscale for a super-resolution model, else reconstruct; steps compares samplers"""
    data: str | None = None  # 'scenes', 'photos', a folder, or a name
    split: str | None = None  # train, val, test or all; default val, train to generate
    scales: tuple[float, ...] = (2.0, 3.7, 6.0)
    sizes: tuple[Size, ...] = ()  # to generate at: 128 or 75x100
    number: Annotated[int | None, arg(aliases=["-n"])] = None
    """of images; default all, or to generate 1000, or the unseen real ones where they are fewer"""
    reference: int | None = None  # real images to generate against; default as many
    protocol: str = "whole"  # whole, benchmark, div2k, paper_faces ...
    features: str = "encoder"  # of the distances: encoder, alexnet, vgg16, or inception (FID)
    allow_few: bool = False  # FID of fewer than 2048 images
    steps: int | None = None  # denoising steps; default 20, 2 to upscale
    sampler: str | None = None  # default dpm_solver_pp
    seed: int = 0  # decides everything
    guidance: float | None = None  # 1: no guide; default the model's
    precision: Literal["auto", "float32"] = "float32"  # to upscale; auto: bfloat16 where faster
    output: Output = None  # a JSON file

    def count(self, default: int) -> int:
        """Return the number of images; ValueError unless memory holds their features."""
        return _check_number("--number", default if self.number is None else self.number)

    def sampling(self, usual: Sampling) -> Sampling:
        """Return how latents are drawn."""
        given = {k: getattr(self, k) for k in vars(usual)}
        return replace(usual, **{k: v for k, v in given.items() if v is not None})

    def partial(self, report: dict, model: ArbitraryScaleModel, images: str) -> Partial:
        """Return the pieces beside the output that this task, model, protocol and data decide.

        What made the first of them is added to the report where it is not what runs now.
        """
        folder = self.output and self.output.with_suffix(".partial")
        facts = {key: report[key] for key in ("task", "model", "weights", "protocol")}
        facts |= {"preset": model.preset.to_dict(), "scale factor": model.scale_factor}
        partial = Partial(folder, {**facts, "images": images, "arithmetic": ARITHMETIC})
        makers = {key: report[key] for key in ("versions", "machine")}
        if (first := partial.numbers("made-with", lambda: makers)) != makers:
            print(f"{partial.folder} was begun with {first}; its pieces are used", file=sys.stderr)
            report["begun with"] = first
        return partial


def evaluate(options: Annotated[Options, arg(name="")]) -> None:
    """Score a model and its baselines on unseen images; print a table, write JSON.

    Processes that accelerate or torchrun launched together compute a share each.
    """
    with _writing(options.output):
        _evaluate(options)


def _evaluate(options: Options) -> None:
    started, (rank, ranks) = time.perf_counter(), launched()
    if ranks > 1 and not options.output:
        raise InputError("several processes share their pieces beside the output; add -o FILE.json")
    wait_for_all()  # they meet before the work, whose shares take different times
    model = ArbitraryScaleModel.load(options.model).to(pick_device())
    task = options.task or ("upscale" if model.preset.low_size else "reconstruct")
    run = _generation if task in ("generate", "steps") else _pairs
    hint = "rerun the same command" if options.output else "next time, add -o"
    with store.resumable(f"stopped; {hint} to resume"):
        report, partial = run(options, model, task)
    report["timing"] = {"seconds": round(time.perf_counter() - started, 3)}
    wait_for_all()
    if rank == 0:
        _report(report, options.output)
        partial.finish()


def _check_number(option: str, n: int) -> int:
    if not 1 <= n <= MAX_NUMBER:
        raise InputError(f"{option} is from 1 to {MAX_NUMBER:,} images, got {n}")
    return n


def _data(options: Options, model: ArbitraryScaleModel) -> str:
    usual = "photos" if model.preset.low_size else model.manifest.get("data", "scenes")
    return options.data or usual


def _pairs(options: Options, model: ArbitraryScaleModel, task: str) -> tuple[dict, Partial]:
    from arbscale.data import open_dataset

    if task == "upscale" and not model.preset.low_size:
        raise InputError(f"{options.model} is a generator; take --task reconstruct or generate")
    if not options.scales or not all(0 < scale <= MAX_SCALE for scale in options.scales):
        raise InputError(f"--scales are up to {MAX_SCALE}, got {options.scales}")
    data = _data(options, model)
    split = options.split or ("test" if data == "scenes" else "val")
    if data == "scenes" and split == "all":
        raise InputError("scenes have an exact ground truth by split; take train, val or test")
    images = open_dataset(data, split)
    n = options.count(32 if data == "scenes" else len(images))
    if n > len(images):
        raise InputError(f"{data}, {split} has {len(images)} images, fewer than {n}")
    rule = get_protocol(options.protocol)
    sampling = options.sampling(UPSCALING if task == "upscale" else Sampling())
    with_lpips = evaluation.lpips_or_why_not()
    choices = evaluation.pair_protocol(rule, images, task, n, sampling, with_lpips)
    if task == "upscale":
        dtype = pick_precision(options.precision, model.device)
        choices["precision"] = str(dtype).removeprefix("torch.")
    report = reports.header(model, task, {"data": data, "split": split, **choices})
    partial = options.partial(report, model, fingerprint(images))

    def rows(index: int, scale: float) -> evaluation.Rows:
        if task == "reconstruct":
            return evaluation.reconstruction_rows(model, images, index, scale, rule)
        how = sampling, index, options.precision
        return evaluation.upscaling_rows(model, images[index], scale, rule, *how)

    names = functools.partial(image_name, images)
    args = rows, rule, options.scales, n, partial, with_lpips, names
    report["results"] = evaluation.evaluate_pairs(*args)
    return report, partial


def _generation(options: Options, model: ArbitraryScaleModel, task: str) -> tuple[dict, Partial]:
    from arbscale.data import ContinuousScenes, open_dataset

    if model.preset.low_size:
        raise InputError(f"{options.model} is a super-resolution model; take --task upscale")
    data, split = _data(options, model), options.split or "train"
    if split == "all":
        raise InputError("--split is train, val or test: other real images come from another")
    n, reference = options.count(1000), options.reference
    if reference is not None:
        _check_number("--reference", reference)
    if data == "scenes":  # there are as many as are asked for
        others = "test" if split != "test" else "train"
        real, unseen = (ContinuousScenes(max(n, reference or 1), split=s) for s in (split, others))
    else:
        real, (others, unseen) = open_dataset(data, split), _unseen(data, split)
        if options.number is None:  # as many as each row of the table can have
            n = min(n, len(unseen))
    side = model.preset.image_size
    usual = ((side, side), (2 * side, 2 * side))
    job = sets.Job(
        model,
        sets.RealPictures(real, min(reference or n, len(real))),
        sets.RealPictures(unseen, min(n, len(unseen))),
        tuple(dict.fromkeys(options.sizes)) or usual[: 1 if task == "steps" else 2],
        n,
        options.features,
        options.sampling(Sampling()),
    )
    sets.check(job, options.allow_few)
    choices = {"data": data, "split": split, "others' split": others, **sets.protocol(job)}
    if task == "steps":
        if options.steps or options.sampler or len(job.sizes) > 1:
            raise InputError(
                f"--task steps takes one size, every sampler, and the steps {sets.STEPS}; "
                "leave --steps and --sampler out"
            )
        choices["sampling"] |= {"steps": sets.STEPS, "sampler": tuple(SAMPLERS)}
        del choices["precision and recall over"], choices["self_ssim"]
    report = reports.header(model, task, choices)
    partial = options.partial(report, model, fingerprint(real) + fingerprint(unseen))
    measure = sets.evaluate_steps if task == "steps" else sets.evaluate_generation
    report["results"] = measure(job, partial)
    return report, partial


def _unseen(data: str, split: str) -> tuple[str, Sequence[Tensor]]:
    """Return the name and the images of another split: test, or else the next that there is."""
    from arbscale.data import open_dataset

    for other in (s for s in ("test", "val", "train") if s != split):
        with contextlib.suppress(InputError, FileNotFoundError):
            return other, open_dataset(data, other)
    raise InputError(f"{data} has no split beside {split!r}, for the rows of other real images")


def _writing(path: Path | None) -> contextlib.AbstractContextManager:
    """Return what keeps other processes from writing an output, refused before anything runs."""
    if path and (path.is_dir() or path.suffix.lower() != ".json"):
        raise InputError(f"{path}: name a JSON file, such as results/{path.stem or 'scores'}.json")
    if path:
        store.check_writable(path)
    own = path and launched()[0] == 0  # of several processes that were launched together
    return store.locked(path) if own else contextlib.nullcontext()


def _report(report: dict, output: Path | None) -> None:
    if output:
        reports.write(report, output)
    print(reports.table(report))


def table(
    files: Annotated[Positional[tuple[Path, ...]], arg(help="JSON files, or folders of them")],
) -> None:
    """Print the results of evaluate, bench and ablate as one markdown document."""
    if not files:
        raise InputError("name JSON files, or folders of them")
    print(reports.document(files))


def bench(
    model: Annotated[Positional[str], arg(help="name or folder")] = "cats",
    *,
    sizes: Annotated[tuple[Size, ...], arg(help="of the output: 128 or 75x100")] = BENCH_SIZES,
    batch: Annotated[int, arg(help="images per call")] = 1,
    steps: Annotated[int, arg(help="denoising steps")] = 20,
    seconds: Annotated[float, arg(help="spent on each row")] = 2.0,
    quick: Annotated[bool, arg(help="time each row once")] = False,
    output: Annotated[Path | None, arg(aliases=["-o"], help=f"a JSON file; {DRAWN}")] = None,
) -> None:
    """Time a model at each size, and ways to render up to 16,384 px beside the released form."""
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"--batch is from 1 to {MAX_BATCH}, got {batch}")
    if not sizes or not 0 <= seconds < float("inf"):
        raise InputError(f"bench takes --sizes, and --seconds from 0 on, got {sizes}, {seconds}")
    with _writing(output):
        loaded = ArbitraryScaleModel.load(model).to(pick_device())
        report = benchmark.measure(loaded, sizes, batch, steps, 0.0 if quick else seconds)
        _report(report, output)
        if output:
            benchmark.plot(report, output.with_suffix(".png"))


def ablate(
    settings: Annotated[ablation.Settings, arg(name="")],
    *,
    output: Annotated[Path, arg(aliases=["-o"], help="a JSON file")],
    folder: Annotated[Path, arg(help="of finished pieces, to resume from")] = Path("runs/ablation"),
) -> None:
    """Train denoisers with and without a transformer at equal cost; print tables, write JSON."""
    with store.resumable(), _writing(output), store.locked(folder):
        _report(ablation.ablate(settings, folder), output)
