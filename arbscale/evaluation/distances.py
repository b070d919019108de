"""Distances between two sets of pictures, seen through a network's features.

A set of N pictures is a matrix of features (N, D), one row a picture. Which network made them is
part of the number: the Fréchet distance is called FID over one network alone, see `features.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from arbscale.coords import Size, Window, check_size
from arbscale.evaluation.features import Extractor, extractor
from arbscale.metrics import BLOCK, FeatureStatistics, check_features, frechet_distance

FID_LEAST = 2048  # pictures: as many as Inception has features


def nearest_distances(points: Tensor, others: Tensor, block: int = BLOCK) -> Tensor:
    """Return each point's distance (N,) to the nearest of the others, in float64.

    Takes features (N, D) and (M, D), `block` rows of distances at a time. Generated pictures that
    are much nearer to the training's than unseen real ones are have been memorised.
    """
    points, others = check_features(points), check_features(others)
    return torch.cat([torch.cdist(x, others).amin(1) for x in points.split(block)])


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


def fid(
    images: Iterable[Tensor], reference: Iterable[Tensor], allow_few: bool = False, batch: int = 32
) -> float:
    """Fréchet Inception distance: 2,048 features of the Inception-v3 of 2015-12-05.

    The network is torch-fidelity's port, its weights come from torch hub's cache or are downloaded
    there; pictures are rounded to 8 bits and resized to 299 px by the port. Features are streamed.
    Source: Heusel et al. 2017.

    Parameters
    ----------
    images, reference
        Pictures (3, H, W) in [-1, 1], one by one, of one size.
    allow_few
        Accept fewer than 2,048 pictures, with a warning: such a number compares to no other.
    batch
        Pictures a step.

    Raises
    ------
    ValueError
        For fewer than 2,048 pictures.
    FileNotFoundError
        Where the weights are neither cached nor to be downloaded; it says what to do.

    """
    network = extractor("inception")
    sets = [FeatureStatistics(), FeatureStatistics()]
    for pictures, statistics in zip((images, reference), sets, strict=True):
        for group in batches(pictures, batch):
            statistics.update(network(group))
    least = min(x.count for x in sets)
    if least < FID_LEAST and not allow_few:
        raise ValueError(
            f"FID needs {FID_LEAST} pictures or more, got {least}; take more, or say "
            "allow_few=True and report the number with it"
        )
    if least < FID_LEAST:
        warnings.warn(f"FID over {least} pictures is biased upwards", stacklevel=2)
    return frechet_distance(*sets)


Crop = Callable[[int, Size, Window], Tensor]
"""`crop(i, size, window)`: a window (3, side, side) of picture i, taken at that size."""


def random_patches(
    crop: Crop, pictures: int, n: int, side: int, sizes: tuple[int, int], seed: int = 0
) -> Iterator[Tensor]:
    """Yield n square patches (3, side, side) at random scales and places.

    Patch i shows picture `i % pictures`, taken at a square size drawn uniformly from `sizes` (both
    ends included). Two sets drawn with one seed have the same sizes and places.
    """
    low, high = sizes
    if not 0 < side <= low <= high:
        raise ValueError(
            f"patches of {side} px need sizes from {side} px on, smallest first, got {sizes}"
        )
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        size = int(torch.randint(low, high + 1, (), generator=generator))
        top, left = torch.randint(0, size - side + 1, (2,), generator=generator).tolist()
        yield crop(i % pictures, check_size(size), (top, left, side, side))


def patch_frechet_distance(
    generated: Iterable[Tensor], real: Iterable[Tensor], network: Extractor, batch: int = 32
) -> float:
    """Fréchet distance between patches: for sizes that have no full-size reference.

    Over Inception's features it is the patch FID (Chai et al. 2022), over others it is not.

    Parameters
    ----------
    generated, real
        Patches (3, side, side) in [-1, 1], such as `random_patches` yields.
    network
        Of `features.extractor`.
    batch
        Patches a step.

    """
    sets = [FeatureStatistics(), FeatureStatistics()]
    for patches, statistics in zip((generated, real), sets, strict=True):
        for group in batches(patches, batch):
            statistics.update(network(group))
    return frechet_distance(*sets)


def patch_fid(generated: Iterable[Tensor], real: Iterable[Tensor], batch: int = 32) -> float:
    """Patch FID: `patch_frechet_distance` over Inception's features; errors as for `fid`."""
    return patch_frechet_distance(generated, real, extractor("inception"), batch)


def batches(pictures: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Stack pictures (3, H, W) into batches (B, 3, H, W), the last one smaller."""
    group: list[Tensor] = []
    for picture in pictures:
        group.append(picture)
        if len(group) == batch:
            yield torch.stack(group)
            group = []
    if group:
        yield torch.stack(group)
