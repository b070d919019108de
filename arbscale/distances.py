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
from arbscale.features import Extractor, extractor

FID_LEAST = 2048  # pictures: as many as Inception has features
NEIGHBOURS = 3  # k of precision and recall, as published
BLOCK = 1024  # rows of a distance matrix held at a time


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64.

    Memory is D x D whatever the number of pictures. Deviations are taken from the running mean
    (Chan, Golub and LeVeque 1983), so large means cost no digits.

    Attributes
    ----------
    count
        Number of pictures so far.
    mean
        (D,), float64.

    """

    def __init__(self, features: Tensor | None = None):
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)  # summed outer products (D, D)
        if features is not None:
            self.update(features)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add the features (B, D) of some pictures, and return self."""
        features = _check_features(features)
        if self.count == 0:
            width = features.shape[1]
            self.mean, self._products = features.new_zeros(width), features.new_zeros(width, width)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"expected {len(self.mean)} features a picture as before, got {features.shape[1]}; "
                "take one extractor for all pictures"
            )
        total = self.count + len(features)
        mean = features.mean(0)
        step, deviations = mean - self.mean, features - mean
        self._products += deviations.T @ deviations  # (D, D)
        self._products += torch.outer(step, step) * (self.count * len(features) / total)
        self.mean = self.mean + step * (len(features) / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """The sample covariance (D, D), float64; ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two pictures or more, got {self.count}")
        return self._products / (self.count - 1)


def frechet_distance(a: FeatureStatistics | Tensor, b: FeatureStatistics | Tensor) -> float:
    """Fréchet distance between two sets, each taken for a Gaussian: 0 for the same moments.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, squared units of the features. It falls
    with the number of pictures, so compare equal numbers alone. Fewer pictures than features leave
    the covariances singular: the formula holds, and the bias is large. The last trace is that of
    the singular values of `S_a^(1/2) S_b^(1/2)`, which needs no complex root.
    Source: Dowson and Landau 1982; Heusel et al. 2017.

    Parameters
    ----------
    a, b
        Features (N, D) or their statistics, at least two pictures each.

    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"expected two sets with the same features, got {len(a.mean)} and {len(b.mean)} a "
            "picture; take one extractor for both"
        )
    roots = [_root(x.covariance) for x in (a, b)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, ((a.mean - b.mean).square().sum() + spread).item())


def precision_recall(
    generated: Tensor, real: Tensor, k: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Improved precision and recall, both in [0, 1]: quality, and coverage of the real pictures.

    Each set is the union of balls around its pictures that reach to the k-th nearest neighbour in
    the set. Precision is the share of generated pictures inside the real set's balls, recall the
    share of real ones inside the generated set's. Both depend on the numbers of pictures.
    Implements Kynkäänniemi et al. 2019, in float64, `block` rows of distances at a time.

    Parameters
    ----------
    generated, real
        Features (N, D) and (M, D), more than k pictures each.
    k
        Neighbours.
    block
        Rows held at once; decides the memory and nothing else.

    """
    generated, real = _check_features(generated), _check_features(real)
    if k < 1 or min(len(generated), len(real)) <= k:
        raise ValueError(
            f"the {k}-th nearest neighbour needs more than {k} pictures in each set and k of at "
            f"least 1, got {len(generated)} and {len(real)}; take more pictures"
        )
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"expected two sets with the same features, got {generated.shape[1]} and "
            f"{real.shape[1]} a picture; take one extractor for both"
        )
    centre = real.mean(0)  # a distance keeps more digits near zero
    generated, real = generated - centre, real - centre
    precision = _inside(generated, real, _radii(real, k, block), block)
    return precision, _inside(real, generated, _radii(generated, k, block), block)


def nearest_distances(points: Tensor, others: Tensor, block: int = BLOCK) -> Tensor:
    """Return each point's distance (N,) to the nearest of the others, in float64.

    Takes features (N, D) and (M, D), `block` rows of distances at a time. Generated pictures that
    are much nearer to the training's than unseen real ones are have been memorised.
    """
    points, others = _check_features(points), _check_features(others)
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


def _check_features(features: Tensor) -> Tensor:
    """Return features (N, D) as float64 on the CPU; ValueError for another form or no numbers."""
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"expected features (N, D), a row a picture, got {features.dtype} "
            f"{tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("expected finite features, got NaN or infinity; look at the pictures")
    return features.detach().cpu().double()


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _radii(points: Tensor, k: int, block: int) -> Tensor:
    """Return each point's distance (N,) to its k-th nearest other point."""
    rows = [torch.cdist(x, points).kthvalue(k + 1).values for x in points.split(block)]
    return torch.cat(rows)  # the nearest one is the point itself


def _inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Return the share of points that lie in at least one ball."""
    rows = [(torch.cdist(x, centres) <= radii).any(1) for x in points.split(block)]
    return torch.cat(rows).double().mean().item()
