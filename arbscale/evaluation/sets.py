"""Scores of generated images against real ones, at several sizes, beside the baselines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arbscale.coords import Size, Window
from arbscale.data import ContinuousScenes, render_scenes, resize, sample_scenes
from arbscale.data.folders import image_name
from arbscale.evaluation.distances import (
    check_fid,
    interval,
    nearest_distances,
    patch_frechet_distance,
    random_patches,
)
from arbscale.evaluation.features import Extractor, extractor, reference_features
from arbscale.evaluation.pairs import centre_crop, eight_bits
from arbscale.evaluation.resume import Partial, shared
from arbscale.metrics import NEIGHBOURS, frechet_distance, precision_recall, self_ssim
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import SAMPLERS, Sampling
from arbscale.store import InputError

BATCH = 20  # images per piece of work: what an interruption costs at most
LEAST = 2 * (NEIGHBOURS + 1)  # images: half of them must have their neighbours
CONSISTENCY = 100  # images at most for SelfSSIM, which compares every pair of sizes
REPEATS = 10  # random halves for an interval
STEPS = (2, 3, 5, 10, 20, 50)  # of each sampler that `evaluate_steps` compares
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the distances to the nearest training image

FEATURES = {"encoder": "encoder", "alexnet": "alexnet", "inception": "vgg16", "vgg16": "vgg16"}
"""By the network of the Fréchet distance: that of precision and recall."""

OURS = "ours"
OWN = "own training-size output, resized"
CEILING = "first stage of other real images (ceiling)"
FLOOR = "other real images (floor)"


def batch_starts(count: int, what: str) -> Iterable[int]:
    """Return 0, `BATCH`, ... below `count`, with a progress bar."""
    return tqdm(range(0, count, BATCH), desc=what, unit="batch")


class RealPictures:
    """The first `count` images of a data set, at any size, (B, 3, H, W) in [-1, 1].

    Scenes are rendered exactly; photographs are cropped to the size's aspect ratio and reduced with
    antialiased bicubic, never enlarged (ValueError).
    """

    def __init__(self, images: Sequence[Tensor], count: int):
        if count < LEAST:
            raise InputError(f"distances between sets need {LEAST} images or more, got {count}")
        self.images, self.count = images, count
        self.exact = isinstance(images, ContinuousScenes)
        self.kernel = "exact rendering" if self.exact else "centre crop, antialiased bicubic"

    def largest(self) -> Size | None:
        """Return the size of the first photograph; None for scenes, which have no largest."""
        return None if self.exact else tuple(self.images[0].shape[-2:])

    def one(self, index: int, size: Size, window: Window | None = None) -> Tensor:
        """Return image `index` at a size (3, H, W), or a window of it."""
        if self.exact:
            scene = sample_scenes(1, self.images.seed, self.images.first + index)
            return render_scenes(scene, size, window)[0]
        image = centre_crop(self.images[index], size)
        if image.shape[-2] < size[0] or image.shape[-1] < size[1]:
            name, found = image_name(self.images, index), "{} x {}".format(*image.shape[-2:])
            wanted = f"{size[0]} x {size[1]}; leave that size out"
            raise InputError(f"{name}, cropped to {found}, is too small for {wanted}")
        top, left, height, width = window or (0, 0, *size)
        return resize(image, size)[:, top : top + height, left : left + width]

    def batch(self, start: int, size: Size) -> Tensor:
        """Return the images from `start` on, `BATCH` of them or what is left."""
        stop = min(start + BATCH, self.count)
        return torch.stack([self.one(i, size) for i in range(start, stop)])

    def features(self, size: Size, network: Extractor, what: str) -> Tensor:
        """Return the features (N, D) of all images at one size, kept in the user's cache."""
        spell = f"{size[0]}x{size[1]}"
        name = f"{self.kernel}, {spell}, first {self.count}"

        def batches() -> Iterator[Tensor]:
            for start in batch_starts(self.count, f"{spell}, {what}"):
                yield self.batch(start, size)

        return reference_features(name, self.images, network, batches)


@dataclass(frozen=True)
class Job:
    """What a generator is measured with."""

    model: ArbitraryScaleModel
    real: RealPictures  # the reference
    others: RealPictures  # images outside the reference; fewer than `n` have no rows
    sizes: tuple[Size, ...]
    n: int
    features: str  # a key of FEATURES
    sampling: Sampling = Sampling()
    partial: Partial | None = None  # finished pieces, given by evaluate_generation

    @property
    def base(self) -> Size:
        """The size that the encoder takes for these latents: the training size of that shape."""
        factor = self.model.preset.factor
        return tuple(factor * n for n in self.model.latent_grid(self.sizes[0]))

    def sample(self, start: int) -> Tensor:
        """Draw the latents from `start` on, `BATCH` of them or what is left."""
        how, count = self.sampling, min(BATCH, self.n - start)
        seed, grid = 100_000 * how.seed + start // BATCH, self.model.latent_grid(self.sizes[0])
        return self.model.sample(count, **{**vars(how), "seed": seed}, grid=grid).cpu()

    def latents(self, start: int) -> Tensor:
        """Return what `sample` gives, drawn once and kept."""
        return self.partial.tensors(f"latents-{start:06d}", lambda: {"z": self.sample(start)})["z"]


def check(job: Job, allow_few: bool) -> None:
    """Refuse a job that cannot give what its table would claim; ValueError says why."""
    if len({job.model.latent_grid(size) for size in job.sizes}) > 1:
        raise InputError("sizes of one aspect ratio are needed: they show the same latents")
    if len(job.sizes) > 1 and min(min(size) for size in job.sizes) < 16:
        raise InputError("SelfSSIM needs sides of 16 px or more; leave the smaller sizes out")
    if job.others.count < job.n:
        print(
            f"without the rows of other real images, of which there are {job.others.count}: a "
            f"distance depends on the number; take --number {job.others.count} to have them",
            file=sys.stderr,
        )
    if job.features not in FEATURES:
        raise InputError(f"unknown features {job.features!r}; take one of {', '.join(FEATURES)}")
    if job.features == "inception":
        check_fid(min(job.n, job.real.count), allow_few)


def protocol(job: Job) -> dict:
    """Return the protocol as JSON can hold it."""
    networks = [extractor(name).label for name in (job.features, FEATURES[job.features])]
    return {
        "pictures": job.n,
        "reference": job.real.count,
        "others": job.others.count,
        "real pictures": job.real.kernel,
        "sizes": [list(size) for size in job.sizes],
        "training size": list(job.base),
        "features": job.features,
        "distance over": networks[0],
        "precision and recall over": f"{networks[1]}, k = {NEIGHBOURS}",
        "interval": f"two standard errors, from {REPEATS} random halves (delete-half jackknife)",
        "sampling": {**asdict(job.sampling), "seeds": f"100000 seed + batch, batches of {BATCH}"},
        "self_ssim": f"first {min(job.n, CONSISTENCY)} images",
    }


@torch.no_grad()
def evaluate_generation(job: Job, partial: Partial) -> dict:
    """Return what is found, by kind, as JSON can hold it.

    `rows` are distance, precision and recall by size and method; `neighbours` are quantiles of the
    distance to the nearest training image; `self_ssim` and `patches` compare sizes. Finished
    batches are kept in `partial`, the features of the reference in the user's cache.
    """
    others = RealPictures(job.others.images, min(job.n, job.others.count))
    job, device = replace(job, partial=partial, others=others), job.model.device
    names = dict.fromkeys((job.features, FEATURES[job.features]))
    networks = {name: extractor(name, device) for name in names}
    shared(job.latents, range(0, job.n, BATCH), "sampling")
    sizes = [size for size in job.sizes if _has_reference(job, size)]
    return {
        "rows": [row for size in sizes for row in _rows(job, size, networks)],
        "self_ssim": _consistency(job),
        "patches": _patches(job, networks[job.features]),
        "neighbours": _neighbours(job, networks),
    }


def _has_reference(job: Job, size: Size) -> bool:
    """Tell whether there are real images of that size; say so on stderr where there are none."""
    largest = job.real.largest()
    if largest is None or (largest[0] >= size[0] and largest[1] >= size[1]):
        return True
    sides = " x ".join(map(str, size)), " x ".join(map(str, largest))
    print("no distance at {}: the real images have {}".format(*sides), file=sys.stderr)
    return False


def _methods(job: Job, size: Size) -> dict[str, tuple[int, Callable[[int], Tensor]]]:
    """Return, by method, the number of images and `images(start)`: a batch (B, 3, H, W)."""
    model = job.model

    def own(start: int) -> Tensor:
        return resize(eight_bits(decode(model, job.latents(start), job.base)), size)

    def ceiling(start: int) -> Tensor:
        given = job.others.batch(start, job.base).to(model.device)
        return decode(model, torch.cat([model.first_stage.encode(x[None]) for x in given]), size)

    methods = {
        OWN: (job.n, own),
        OURS: (job.n, lambda start: decode(model, job.latents(start), size)),
        CEILING: (job.others.count, ceiling),
        FLOOR: (job.others.count, lambda start: job.others.batch(start, size)),
    }
    if size == job.base:
        del methods[OWN]  # it is ours there
    return methods


def decode(model: ArbitraryScaleModel, z: Tensor, size: Size) -> Tensor:
    """Render latents one by one, which bounds the memory, as images (B, 3, H, W) on the CPU."""
    return torch.cat([model.decode(one[None].to(model.device), size).cpu() for one in z])


def _rows(job: Job, size: Size, networks: dict[str, Extractor]) -> Iterator[dict]:
    """Compare each method's images at one size with the real ones.

    A distance depends on the number of images, so each row has `job.n`, or there is no row.
    """
    real = {name: job.real.features(size, x, "reference") for name, x in networks.items()}
    for method, (count, _) in _methods(job, size).items():
        if count < job.n:
            continue
        seen = features_of(job, size, method, networks)
        row = {"size": list(size), "method": method, "pictures": len(seen[job.features])}
        for network, names, measure in (
            (job.features, ("distance",), lambda a, b: (frechet_distance(a, b),)),
            (FEATURES[job.features], ("precision", "recall"), precision_recall),
        ):
            pair = seen[network], real[network]
            margins = interval(measure, *pair, REPEATS, job.sampling.seed)
            for name, value, margin in zip(names, measure(*pair), margins, strict=True):
                row |= {name: value, f"{name}_pm": margin}  # half-width of the interval
        yield row


def features_of(
    job: Job, size: Size, method: str, networks: dict[str, Extractor]
) -> dict[str, Tensor]:
    """Return the features (N, D) of a method's images at one size, by network."""
    spell = f"{size[0]}x{size[1]}"
    count, images = _methods(job, size)[method]

    def see(start: int) -> dict[str, Tensor]:
        batch = images(start)
        return {name: network(batch) for name, network in networks.items()}

    def kept(start: int) -> dict[str, Tensor]:
        return job.partial.tensors(f"{spell}-{method.split()[0]}-{start:06d}", lambda: see(start))

    parts = shared(kept, range(0, count, BATCH), f"{spell}, {method}")
    return {name: torch.cat([part[name] for part in parts]) for name in networks}


def _consistency(job: Job) -> dict | None:
    """Return both SelfSSIM matrices of ours and of the resized fixed-size output."""
    if len(job.sizes) < 2:
        return None
    count = min(job.n, CONSISTENCY)

    def kept(start: int) -> tuple[float, dict]:
        z = job.latents(start)[: count - start]
        part = job.partial.numbers(f"consistency-{start:06d}", lambda: _matrices(job, z))
        return len(z) / count, part

    parts = shared(kept, range(0, count, BATCH), "SelfSSIM")

    def mean(method: str, variant: str) -> list[list[float]]:
        matrices = (w * torch.tensor(x[method][variant], dtype=torch.float64) for w, x in parts)
        return sum(matrices).tolist()

    matrices = {m: {v: mean(m, v) for v in variants} for m, variants in parts[0][1].items()}
    return {"pictures": count, "sizes": [list(size) for size in job.sizes], **matrices}


def _matrices(job: Job, z: Tensor) -> dict[str, dict[str, list]]:
    own = eight_bits(decode(job.model, z, job.base))
    methods = {
        OURS: {size: decode(job.model, z, size) for size in job.sizes},
        OWN: {size: resize(own, size) for size in job.sizes},
    }
    return {
        method: {v: self_ssim(images, v).tolist() for v in ("clean", "scaleparty")}
        for method, images in methods.items()
    }


def _patches(job: Job, network: Extractor) -> dict | None:
    """Return the distance between patches of the training size at random larger sizes.

    The sizes go up to that of the smallest real image, or of scenes to the largest that was asked
    for. None where that is no larger than a patch, and for sizes that are not square.
    """
    side, real = min(job.base), job.real
    if job.base[0] != job.base[1]:
        return None
    if real.exact:
        high = max(max(size) for size in job.sizes)
    else:
        high = min(min(real.images[i].shape[-2:]) for i in range(real.count))
    if high <= side:
        return None

    def ours(i: int, size: Size, window: Window) -> Tensor:
        z = job.latents(i // BATCH * BATCH)[i % BATCH]
        return job.model.decode(z[None].to(job.model.device), size, window)[0].cpu()

    def patches(crop: Callable, count: int, name: str) -> Iterator[Tensor]:
        found = random_patches(crop, count, job.n, side, (side, high), job.sampling.seed)
        return tqdm(found, desc=f"patches, {name}", total=job.n, unit="patch")

    def distance() -> float:
        sets = patches(ours, job.n, "ours"), patches(job.real.one, job.real.count, "real")
        return patch_frechet_distance(*sets, network)

    found = job.partial.numbers("patches", distance)
    return {"side": side, "sizes": [side, high], "patches": job.n, "distance": found}


def _neighbours(job: Job, networks: dict[str, Extractor]) -> dict | None:
    """Return quantiles of the distance to the nearest image of the whole training list.

    Of generated and of other real images, at the training size. None for scenes, which are endless,
    and where the real images are smaller.
    """
    if job.real.exact or not _has_reference(job, job.base):
        return None
    name = job.features
    whole = RealPictures(job.real.images, len(job.real.images))
    train = whole.features(job.base, networks[name], "training list")
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {}
    for method in (OURS, FLOOR):
        found = nearest_distances(features_of(job, job.base, method, networks)[name], train)
        quantiles[method] = found.quantile(levels).tolist()
    return {"pictures": whole.count, "levels": list(QUANTILES), **quantiles}


@torch.no_grad()
def evaluate_steps(job: Job, partial: Partial) -> dict:
    """Return `rows`, one for each sampler and number in `STEPS`, and the `ceiling`, if any.

    A row holds the Fréchet distance to the reference at the job's first size, the half-width of its
    interval (`distance_pm`), and the seconds that drawing one latent took: the median over the
    batches, without decoding; on a CPU they are CPU seconds, which other programs do not lengthen.
    All rows start from the same noise. The ceiling is the first stage of as many other real images.
    """
    job, name = replace(job, partial=partial), job.features
    network = extractor(name, job.model.device)
    real = job.real.features(job.sizes[0], network, "reference")
    results = {"rows": []}
    for sampler in SAMPLERS:
        for steps in STEPS:
            sampling = replace(job.sampling, steps=steps, sampler=sampler)
            seen, seconds = _sampled(replace(job, sampling=sampling), network)
            row = {"sampler": sampler, "steps": steps, "seconds": seconds}
            results["rows"].append(row | _distance(seen, real))
    if job.others.count == job.n:
        seen = features_of(job, job.sizes[0], CEILING, {name: network})[name]
        results["ceiling"] = _distance(seen, real)
    return results


def _sampled(job: Job, network: Extractor) -> tuple[Tensor, float]:
    """Return the features (N, D) of the job's images, and the seconds that one latent took."""
    what = f"{job.sampling.sampler}, {job.sampling.steps} steps"
    clock = time.process_time if job.model.device.type == "cpu" else time.perf_counter

    def piece(start: int) -> dict[str, Tensor]:
        started = clock()
        z = job.sample(start)
        seconds = torch.tensor([(clock() - started) / len(z)])
        return {"seen": network(decode(job.model, z, job.sizes[0])), "seconds": seconds}

    def kept(start: int) -> dict[str, Tensor]:
        return job.partial.tensors(f"{what}, {start:06d}", lambda: piece(start))

    parts = shared(kept, range(0, job.n, BATCH), what)
    seen, seconds = (torch.cat([part[key] for part in parts]) for key in ("seen", "seconds"))
    return seen, seconds.median().item()


def _distance(seen: Tensor, real: Tensor) -> dict[str, float]:
    (margin,) = interval(lambda a, b: (frechet_distance(a, b),), seen, real, REPEATS)
    return {"distance": frechet_distance(seen, real), "distance_pm": margin}
