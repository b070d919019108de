"""Scores of generated pictures against real ones, at several sizes, beside the baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arbscale.coords import Size, Window
from arbscale.data import ContinuousScenes, render_scenes, resize, sample_scenes
from arbscale.evaluation.distances import (
    FID_LEAST,
    interval,
    nearest_distances,
    patch_frechet_distance,
    random_patches,
)
from arbscale.evaluation.features import Extractor, extractor, reference_features
from arbscale.evaluation.pairs import Sampling
from arbscale.evaluation.protocols import centre_crop, eight_bits
from arbscale.evaluation.resume import Partial
from arbscale.metrics import NEIGHBOURS, frechet_distance, precision_recall, self_ssim
from arbscale.model import ArbitraryScaleModel

BATCH = 20  # pictures a piece of work: what an interruption costs at most
LEAST = 2 * (NEIGHBOURS + 1)  # pictures: half of them must have their neighbours
CONSISTENCY = 100  # pictures at most for SelfSSIM, which compares every pair of sizes
REPEATS = 10  # random halves for an interval
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the distances to the nearest training picture

FEATURES = {
    "encoder": ("encoder", "encoder"),
    "alexnet": ("alexnet", "alexnet"),
    "inception": ("inception", "vgg16"),
    "vgg16": ("vgg16", "vgg16"),
}
"""By name: the network of the Fréchet distance, and that of precision and recall."""

OURS = "ours"
OWN = "own training-size output, resized"
CEILING = "first stage of other real pictures (ceiling)"
FLOOR = "other real pictures (floor)"


class RealPictures:
    """The first `count` pictures of a data set, at any size, (B, 3, H, W) in [-1, 1].

    Scenes are rendered exactly; photographs are cropped to the size's aspect ratio and reduced with
    antialiased bicubic, never enlarged (ValueError).
    """

    def __init__(self, images: Sequence[Tensor], count: int):
        if count < LEAST:
            raise ValueError(
                f"distances between sets need {LEAST} pictures or more, got {count}; take more "
                "with -n, or another data set"
            )
        self.images, self.count = images, count
        self.exact = isinstance(images, ContinuousScenes)
        self.kernel = "exact rendering" if self.exact else "centre crop, antialiased bicubic"

    def largest(self) -> Size | None:
        """Return the size of the first photograph; None for scenes, which have no largest."""
        return None if self.exact else tuple(self.images[0].shape[-2:])

    def one(self, index: int, size: Size, window: Window | None = None) -> Tensor:
        """Return picture `index` at a size (3, H, W), or a window of it."""
        if self.exact:
            scene = sample_scenes(1, self.images.seed, self.images.first + index)
            return render_scenes(scene, size, window)[0]
        image = centre_crop(self.images[index], size)
        if image.shape[-2] < size[0] or image.shape[-1] < size[1]:
            raise ValueError(
                f"picture {index} has {self.images[index].shape[-2]} x "
                f"{self.images[index].shape[-1]} pixels and is no reference for {size[0]} x "
                f"{size[1]}; leave that size out, or take larger pictures"
            )
        top, left, height, width = window or (0, 0, *size)
        return resize(image, size)[:, top : top + height, left : left + width]

    def batch(self, start: int, size: Size) -> Tensor:
        """Return the pictures from `start` on, `BATCH` of them or what is left."""
        stop = min(start + BATCH, self.count)
        return torch.stack([self.one(i, size) for i in range(start, stop)])


@dataclass(frozen=True)
class Job:
    """What a generator is measured with."""

    model: ArbitraryScaleModel
    real: RealPictures  # the reference
    others: RealPictures  # pictures that are not in the reference
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

    def latents(self, start: int) -> Tensor:
        """Return the sampled latents from `start` on, `BATCH` of them or what is left."""
        how = self.sampling
        seed = 100_000 * how.seed + start // BATCH

        def sample() -> dict[str, Tensor]:
            grid, count = self.model.latent_grid(self.sizes[0]), min(BATCH, self.n - start)
            z = self.model.sample(count, seed, how.steps, how.sampler, grid)
            return {"z": z.cpu()}

        return self.partial.tensors(f"latents-{start:06d}", sample)["z"]


def check(job: Job, allow_few: bool) -> None:
    """Refuse a job that cannot give what its table would claim; ValueError says why."""
    if len({job.model.latent_grid(size) for size in job.sizes}) > 1:
        raise ValueError("sizes of one aspect ratio are needed: they show the same latents")
    if len(job.sizes) > 1 and min(min(size) for size in job.sizes) < 16:
        raise ValueError("SelfSSIM needs sides of 16 px or more; leave the smaller sizes out")
    if job.features not in FEATURES:
        raise ValueError(f"unknown features {job.features!r}; take one of {', '.join(FEATURES)}")
    least = min(job.n, job.real.count)
    if job.features == "inception" and least < FID_LEAST:
        if not allow_few:
            raise ValueError(
                f"FID needs {FID_LEAST} pictures on both sides, got {job.n} and {job.real.count}; "
                "take more, or say --allow-few and report the number with it"
            )
        print(f"FID over {least} pictures is biased upwards", file=sys.stderr)


def protocol(job: Job) -> dict:
    """Return the protocol as JSON can hold it."""
    networks = [extractor(name).label for name in FEATURES[job.features]]
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
        "self_ssim": f"first {min(job.n, CONSISTENCY)} pictures",
    }


@torch.no_grad()
def evaluate_generation(job: Job, partial: Partial) -> dict:
    """Return what is found, by kind, as JSON can hold it.

    `rows` are distance, precision and recall by size and method; `neighbours` are quantiles of the
    distance to the nearest training picture; `self_ssim` and `patches` compare sizes. Finished
    batches are kept in `partial`, the features of the reference in the user's cache.
    """
    job, device = replace(job, partial=partial), job.model.device
    networks = {name: extractor(name, device) for name in dict.fromkeys(FEATURES[job.features])}
    numbers = sum(network.dimensions for network in networks.values())
    megabytes = 4 * numbers * (job.n + job.real.count) / 1e6
    print(f"features in memory at a time: {megabytes:.0f} MB", file=sys.stderr)
    for start in tqdm(range(0, job.n, BATCH), desc="sampling", unit="batch"):
        job.latents(start)
    rows = []
    for size in job.sizes:
        if _has_reference(job, size):
            rows += _rows(job, size, networks)
    return {
        "rows": rows,
        "self_ssim": _consistency(job),
        "patches": _patches(job, networks[FEATURES[job.features][0]]),
        "neighbours": _neighbours(job, networks),
    }


def _has_reference(job: Job, size: Size) -> bool:
    """Tell whether there are real pictures of that size; say so on stderr where there are none."""
    largest = job.real.largest()
    if largest is None or (largest[0] >= size[0] and largest[1] >= size[1]):
        return True
    print(
        f"no distance at {size[0]} x {size[1]}: the real pictures have {largest[0]} x "
        f"{largest[1]}; see the patches",
        file=sys.stderr,
    )
    return False


def _methods(job: Job, size: Size) -> dict[str, tuple[int, Callable[[int], Tensor]]]:
    """Return, by method, the number of pictures and `pictures(start)`: a batch (B, 3, H, W)."""
    model = job.model

    def own(start: int) -> Tensor:
        return resize(eight_bits(_decode(model, job.latents(start), job.base)), size)

    def ceiling(start: int) -> Tensor:
        given = job.others.batch(start, job.base).to(model.device)
        return _decode(model, torch.cat([model.first_stage.encode(x[None]) for x in given]), size)

    methods = {
        OWN: (job.n, own),
        OURS: (job.n, lambda start: _decode(model, job.latents(start), size)),
        CEILING: (job.others.count, ceiling),
        FLOOR: (job.others.count, lambda start: job.others.batch(start, size)),
    }
    if size == job.base:
        del methods[OWN]  # it is ours there
    return methods


def _decode(model: ArbitraryScaleModel, z: Tensor, size: Size) -> Tensor:
    """Render latents one by one, which bounds the memory, as pictures (B, 3, H, W) on the CPU."""
    return torch.cat([model.decode(one[None].to(model.device), size).cpu() for one in z])


def _rows(job: Job, size: Size, networks: dict[str, Extractor]) -> list[dict]:
    """Compare each method's pictures at one size with the real ones."""
    real = {
        name: _reference(job.real, size, network, "reference") for name, network in networks.items()
    }
    rows = []
    for method, (count, _) in _methods(job, size).items():
        seen = _seen(job, size, method, networks)
        rows.append({"size": list(size), "method": method, "pictures": count})
        rows[-1] |= compare_sets(seen, real, *FEATURES[job.features], job.sampling.seed)
    return rows


def _reference(real: RealPictures, size: Size, network: Extractor, what: str) -> Tensor:
    """Return the features (N, D) of real pictures at one size, kept in the user's cache."""
    spell = f"{size[0]}x{size[1]}"
    starts = tqdm(range(0, real.count, BATCH), desc=f"{spell}, {what}", unit="batch")
    return reference_features(
        f"{real.kernel}, {spell}, first {real.count}",
        real.images,
        network,
        lambda: (real.batch(start, size) for start in starts),
    )


def _seen(job: Job, size: Size, method: str, networks: dict[str, Extractor]) -> dict[str, Tensor]:
    """Return the features (N, D) of a method's pictures at one size, by network."""
    spell = f"{size[0]}x{size[1]}"
    count, pictures = _methods(job, size)[method]
    parts = []
    for start in tqdm(range(0, count, BATCH), desc=f"{spell}, {method}", unit="batch"):
        name = f"{spell}-{method.split()[0]}-{start:06d}"
        parts.append(job.partial.tensors(name, lambda start=start: _see(pictures(start), networks)))
    return {name: torch.cat([part[name] for part in parts]) for name in networks}


def _see(pictures: Tensor, networks: dict[str, Extractor]) -> dict[str, Tensor]:
    return {name: network(pictures) for name, network in networks.items()}


def compare_sets(
    generated: dict[str, Tensor],
    real: dict[str, Tensor],
    distance: str,
    neighbours: str,
    seed: int = 0,
) -> dict[str, float]:
    """Return distance, precision and recall, each with the half-width of its interval.

    `generated` and `real` hold features (N, D) by network; `distance` and `neighbours` name the
    network of the Fréchet distance and that of precision and recall.
    """
    a, b = generated[distance], real[distance]
    c, d = generated[neighbours], real[neighbours]
    (distance_pm,) = interval(lambda x, y: (frechet_distance(x, y),), a, b, REPEATS, seed)
    precision_pm, recall_pm = interval(precision_recall, c, d, REPEATS, seed)
    precision, recall = precision_recall(c, d)
    return {
        "distance": frechet_distance(a, b),
        "distance_pm": distance_pm,
        "precision": precision,
        "precision_pm": precision_pm,
        "recall": recall,
        "recall_pm": recall_pm,
    }


def _consistency(job: Job) -> dict | None:
    """Return both SelfSSIM matrices of ours and of the resized fixed-size output."""
    if len(job.sizes) < 2:
        return None
    count = min(job.n, CONSISTENCY)
    total: dict[str, dict[str, Tensor]] = {}
    for start in tqdm(range(0, count, BATCH), desc="SelfSSIM", unit="batch"):
        z = job.latents(start)[: count - start]
        part = job.partial.numbers(f"consistency-{start:06d}", lambda z=z: _matrices(job, z))
        for method, variants in part.items():
            for variant, matrix in variants.items():
                share = torch.tensor(matrix, dtype=torch.float64) * (len(z) / count)
                sums = total.setdefault(method, {})
                sums[variant] = sums.get(variant, 0) + share
    matrices = {m: {v: x.tolist() for v, x in vs.items()} for m, vs in total.items()}
    return {"pictures": count, "sizes": [list(size) for size in job.sizes], **matrices}


def _matrices(job: Job, z: Tensor) -> dict[str, dict[str, list]]:
    own = eight_bits(_decode(job.model, z, job.base))
    methods = {
        OURS: {size: _decode(job.model, z, size) for size in job.sizes},
        OWN: {size: resize(own, size) for size in job.sizes},
    }
    return {
        method: {v: self_ssim(pictures, v).tolist() for v in ("clean", "scaleparty")}
        for method, pictures in methods.items()
    }


def _patches(job: Job, network: Extractor) -> dict | None:
    """Return the distance between patches of the training size at random larger sizes.

    The sizes go up to that of the real pictures, or of scenes to the largest that was asked for.
    None where no real picture is larger than a patch.
    """
    side = min(job.base)
    largest = job.real.largest()
    high = min(largest) if largest else max(max(size) for size in job.sizes)
    if high <= side or job.base[0] != job.base[1]:
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

    return {
        "side": side,
        "sizes": [side, high],
        "patches": job.n,
        "distance": job.partial.numbers("patches", distance),
    }


def _neighbours(job: Job, networks: dict[str, Extractor]) -> dict | None:
    """Return quantiles of the distance to the nearest picture of the whole training list.

    Of generated and of other real pictures, at the training size. None for scenes, which are
    endless, and where the real pictures are smaller.
    """
    if job.real.exact or not _has_reference(job, job.base):
        return None
    name = FEATURES[job.features][0]
    whole = RealPictures(job.real.images, len(job.real.images))
    train = _reference(whole, job.base, networks[name], "training list")
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    found = {
        method: nearest_distances(_seen(job, job.base, method, networks)[name], train)
        for method in (OURS, FLOOR)
    }
    quantiles = {method: x.quantile(levels).tolist() for method, x in found.items()}
    return {"pictures": whole.count, "levels": list(QUANTILES), **quantiles}
