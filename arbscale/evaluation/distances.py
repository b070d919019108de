"""Distances between two sets of images, seen through a network's features.

A set of N images is a matrix of features (N, D), one row per image. Which network made them is part
of the number: the Fréchet distance is called FID over one network alone, see `features.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from arbscale.coords import Size, Window, check_size
from arbscale.evaluation.features import Extractor, extractor
from arbscale.metrics import BLOCK, check_features, distances, frechet_distance
from arbscale.store import InputError

FID_LEAST = 2048  # images: as many as Inception has features


def nearest_distances(points: Tensor, others: Tensor, block: int = BLOCK) -> Tensor:
    """Return each point's distance (N,) to the nearest of the others, in float64.

    Takes features (N, D) and (M, D), `block` rows of distances at a time. Generated images that are
    much nearer to the training images than unseen real ones are have been memorised.
    """
    points, others = check_features(points, others)
    return torch.cat([distances(x, others).amin(1) for x in points.split(block)])


def interval(
    measure: Callable[[Tensor, Tensor], tuple[float, ...]],
    generated: Tensor,
    real: Tensor,
    repeats: int = 10,
    seed: int = 0,
) -> tuple[float, ...]:
    """Half-width of the 95 % interval of each number that `measure(generated, real)` gives.

    Half of each set is drawn without replacement, `repeats` times. The spread of a number over the
    halves estimates its standard error over the whole sets (the delete-half jackknife, Shao and
    Wu 1989); twice that is returned. The halves' own mean is biased and not used.
    """
    generator = torch.Generator().manual_seed(seed)

    def half(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[: len(x) // 2]]

    values = [measure(half(generated), half(real)) for _ in range(repeats)]
    return tuple((2 * torch.tensor(values, dtype=torch.float64).std(dim=0)).tolist())


def check_fid(images: int, allow_few: bool) -> None:
    """Raise ValueError where FID has fewer than 2,048 images; warn instead if they are allowed."""
    if images >= FID_LEAST:
        return
    if not allow_few:
        wanted = f"{FID_LEAST} images in each set, got {images}"
        raise InputError(f"FID needs {wanted}; take more, or --allow-few (allow_few=True)")
    warnings.warn(f"FID over {images} images is biased upwards", stacklevel=3)


def fid(images: Iterable[Tensor], reference: Iterable[Tensor], allow_few: bool = False) -> float:
    """Fréchet Inception distance: 2,048 features of the Inception-v3 of 2015-12-05.

    Takes images (3, H, W) in [-1, 1], one by one, of one size; only their features are held. The
    network is torch-fidelity's port, which rounds them to 8 bits and resizes them to 299 px; its
    weights come from torch hub's cache or are downloaded there, else FileNotFoundError. ValueError
    for fewer than 2,048 images, unless `allow_few`: such a number compares to no other.
    Source: Heusel et al. 2017.
    """
    network = extractor("inception")
    sets = [_features(x, network) for x in (images, reference)]
    check_fid(min(map(len, sets)), allow_few)
    return frechet_distance(*sets)


Crop = Callable[[int, Size, Window], Tensor]
"""`crop(i, size, window)`: a window (3, side, side) of image i, taken at that size."""


def random_patches(
    crop: Crop, images: int, n: int, side: int, sizes: tuple[int, int], seed: int = 0
) -> Iterator[Tensor]:
    """Yield n square patches (3, side, side) at random scales and places.

    Patch i shows image `i % images`, taken at a square size drawn uniformly from `sizes` (both ends
    included). Two sets drawn with one seed have the same sizes and places.
    """
    low, high = sizes
    if not 0 < side <= low <= high:
        raise InputError(f"patches of {side} px need sizes from {side} px, smallest first: {sizes}")
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        size = int(torch.randint(low, high + 1, (), generator=generator))
        top, left = torch.randint(0, size - side + 1, (2,), generator=generator).tolist()
        yield crop(i % images, check_size(size), (top, left, side, side))


def patch_frechet_distance(
    generated: Iterable[Tensor], real: Iterable[Tensor], network: Extractor
) -> float:
    """Fréchet distance between patches: for sizes that have no full-size reference.

    Takes patches (3, side, side) in [-1, 1], such as `random_patches` yields. Over Inception's
    features it is the patch FID (Chai et al. 2022), over others it is not.
    """
    return frechet_distance(_features(generated, network), _features(real, network))


def _features(images: Iterable[Tensor], network: Extractor, batch: int = 32) -> Tensor:
    """Return the features (N, D) of images (3, H, W), read a batch at a time."""
    images = iter(images)
    groups = iter(lambda: list(islice(images, batch)), [])
    return torch.cat([network(torch.stack(group)) for group in groups])
