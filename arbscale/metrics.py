"""Metrics: one function each, all taking images in [-1, 1].

The definition is part of the number. PSNR and SSIM are those of the super-resolution benchmarks, on
images rounded to 8 bits; say with every result which colour space and which border it has. The
distances between sets take features, (N, D) for N pictures; which network made them is part of the
number. How sets are streamed through a network is in `evaluation`, as is the speed.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import Size, check_size

__all__ = [
    "FeatureStatistics",
    "frechet_distance",
    "lpips",
    "lpips_is_there",
    "precision_recall",
    "psnr",
    "self_ssim",
    "ssim",
]

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
"""The SSIM window's side and standard deviation in pixels, and the two stabilising constants."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, from fine to coarse (Wang, Simoncelli and Bovik 2003)."""

NEIGHBOURS = 3  # k of precision and recall, as published
BLOCK = 1024  # rows of a distance matrix held at a time


def psnr(a: Tensor, b: Tensor, space: str = "rgb", border: int = 0) -> float:
    """Peak signal-to-noise ratio in decibels: `10 log10(255^2 / mean squared error)`.

    Images are clamped and rounded to 8 bits. The ratio is taken per image, then averaged over the
    images; identical images give infinity.

    Parameters
    ----------
    a, b
        Float images (B, 3, H, W) or (3, H, W) in [-1, 1]; which is the reference does not matter.
    space
        "rgb": the error is a mean over the three channels. "y": luma of ITU-R BT.601 in studio
        range 16 to 235 (MATLAB's `rgb2ycbcr`, not rounded again), about 1.5 dB higher.
    border
        Pixels left out on each side. Benchmarks take the scale (with "y"), DIV2K the scale + 6.

    """
    a, b = _eight_bit_pair(a, b, space, border)  # (B, 3 or 1, H, W)
    mean_squared_error = (a - b).square().mean(dim=(1, 2, 3))  # (B,)
    return (10 * torch.log10(255**2 / mean_squared_error)).mean().item()


def ssim(a: Tensor, b: Tensor, space: str = "rgb", border: int = 0) -> float:
    """Structural similarity, at most 1, which identical images have.

    Gaussian window of 11 pixels with sigma 1.5, population covariance, data range 1, mean over the
    places where the window fits, over channels, then over images. Images are clamped and rounded to
    8 bits as for `psnr`. Computed by scikit-image. Source: Wang et al. 2004.

    Parameters
    ----------
    a, b
        Float images (B, 3, H, W) or (3, H, W) in [-1, 1], at least 11 pixels a side.
    space, border
        As for `psnr`.

    """
    from skimage.metrics import structural_similarity

    a, b = _eight_bit_pair(a, b, space, border)  # (B, 3 or 1, H, W)
    _check_window_fits(a)
    values = [
        structural_similarity(
            x.numpy() / 255,
            y.numpy() / 255,
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    return float(sum(values) / len(values))


def lpips(a: Tensor, b: Tensor, net: str = "alex") -> float:
    """Learned perceptual distance, v0.1, at least 0, which identical images have.

    Mean over the images. Computed by the package `lpips` (Zhang et al. 2018); the backbone's
    ImageNet weights come from torch hub's cache, from the folder that ARBSCALE_WEIGHTS names, or by
    download, in this order.

    Parameters
    ----------
    a, b
        Float images (B, 3, H, W) or (3, H, W) in [-1, 1], at least 32 pixels a side. What lies
        outside is clamped.
    net
        "alex" (AlexNet, for reports) or "squeeze" (SqueezeNet).

    Raises
    ------
    FileNotFoundError
        Where the weights are nowhere; it says how to get them.

    """
    if net not in _BACKBONES:
        raise ValueError(f"unknown backbone {net!r}; take {' or '.join(_BACKBONES)}")
    if a.shape != b.shape or min(a.shape[-2:]) < 32:
        raise ValueError(
            f"LPIPS takes two batches of one shape, sides of at least 32 px, got {tuple(a.shape)} "
            f"and {tuple(b.shape)}; crop or resize them"
        )
    a, b = (_check_images(x) for x in (a, b))
    network = lpips_network(net).to(a.device)
    with torch.no_grad():
        pairs = zip(a.clamp(-1, 1).float(), b.clamp(-1, 1).float(), strict=True)
        return sum(network(x[None], y[None]).item() for x, y in pairs) / len(a)


def lpips_is_there(net: str = "alex") -> bool:
    """Tell whether the weights that `lpips` needs are found on this machine."""
    from arbscale.evaluation.features import backbone_file

    return backbone_file(_BACKBONES[net]) is not None


_BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1"}


@functools.lru_cache(maxsize=2)
def lpips_network(net: str) -> torch.nn.Module:
    """Return the network behind `lpips`, on the CPU; it is loaded once and shared."""
    import lpips as package

    from arbscale.evaluation.features import backbone_state

    state = backbone_state(_BACKBONES[net])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of arguments that the package still uses
        network = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    named = {name.split(".", 1)[1]: p for name, p in network.net.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():  # "slice1.0.weight" there is "features.0.weight" here
            parameter.copy_(state[f"features.{name}"])
    return network.eval()


@torch.no_grad()
def self_ssim(images: dict[int | Size, Tensor], variant: str = "clean") -> Tensor:
    """Consistency over sizes: how similar the same latents' pictures at sizes a and b are.

    No reference is needed, so a blurred picture scores well: report it beside a measure of quality.

    Parameters
    ----------
    images
        Pictures of the same N latents by size: `{64: (N, 3, 64, 64), (75, 100): (N, 3, 75, 100)}`,
        floats in [-1, 1]; what lies outside is clamped.
    variant
        "clean": the picture of size b is resized to size a with antialiased bicubic (a = -0.5, as
        PIL) and compared by single-scale SSIM (`ssim`'s window, mean over RGB), all in floating
        point; sides of 11 or more. "scaleparty": as the code published with ScaleParty (Ntavelis et
        al. 2022): truncated to 8 bits, resized by nearest neighbour, compared by five-scale MS-SSIM
        (Wang et al. 2003) whose window shrinks where a side is shorter; sides of 16 or more.

    Returns
    -------
    A float64 matrix on the CPU over all ordered pairs, in the order of `images`: row a, column b is
    measured at size a. Means over the N images; 1 on the diagonal.

    """
    compare = {"clean": _clean_similarity, "scaleparty": _scaleparty_similarity}.get(variant)
    if compare is None:
        raise ValueError(f"unknown variant {variant!r}; take clean or scaleparty")
    pictures = _check_pictures(images, least=WINDOW if variant == "clean" else 16)
    rows = [[_mean_in_chunks(compare, a, b) for b in pictures] for a in pictures]
    return torch.tensor(rows, dtype=torch.float64)


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
        features = check_features(features)
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
    generated, real = check_features(generated), check_features(real)
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


def _clean_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the single-scale SSIM (N,) of [-1, 1] images at a's size, b resized to it."""
    if a.shape != b.shape:
        b = F.interpolate(b, a.shape[-2:], mode="bicubic", antialias=True)
    return _ssim_terms(a, b, data_range=2, offset=1)[0]


def _scaleparty_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the MS-SSIM (N,) of truncated images at a's size, b resized to it."""
    b = F.interpolate(b, a.shape[-2:], mode="nearest")
    return _ms_ssim(*(((x + 1) * 127.5).floor() for x in (a, b)))


def _ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the five-scale SSIM (N,) of images (N, C, H, W) in [0, 255].

    2x2 means lead from a scale to the next; an odd last row or column is dropped on the way.
    """
    product = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale > 0:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)  # (N, C, H/2, W/2)
        full, contrast = _ssim_terms(a, b, data_range=255)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        product = product * (full if last else contrast).clamp(min=0) ** weight
    return product


def _ssim_terms(
    a: Tensor, b: Tensor, data_range: float, offset: float = 0
) -> tuple[Tensor, Tensor]:
    """Return SSIM and its contrast-structure factor alone, means over each image, both (N,).

    The images (N, C, H, W) are taken as `image + offset`, in [0, `data_range`]. The window shrinks
    in proportion when a side is shorter, and stays inside the image.
    """
    a, b = a + offset, b + offset
    side = min(WINDOW, *a.shape[-2:])
    places = torch.arange(side, dtype=a.dtype, device=a.device) - (side - 1) / 2
    window = torch.softmax(-((places / (SIGMA * side / WINDOW)) ** 2) / 2, dim=0)  # (side,)

    mean_a, mean_b = _blur(a, window), _blur(b, window)  # (N, C, H - side + 1, W - side + 1)
    variances = _blur(a * a, window) - mean_a**2 + _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _blur(images: Tensor, window: Tensor) -> Tensor:
    """Filter each channel along both axes, only where the window fits."""
    planes = images.flatten(0, 1).unsqueeze(1)  # (N*C, 1, H, W)
    planes = F.conv2d(planes, window.view(1, 1, -1, 1))
    planes = F.conv2d(planes, window.view(1, 1, 1, -1))
    return planes.squeeze(1).unflatten(0, images.shape[:2])  # (N, C, H', W')


def _mean_in_chunks(compare, a: Tensor, b: Tensor, chunk: int = 16) -> float:
    """Return the mean of `compare(a, b)` (N,), computed in float64 on a few images at a time."""
    pairs = zip(a.split(chunk), b.split(chunk), strict=True)
    values = [compare(*(x.double().clamp(-1, 1) for x in pair)) for pair in pairs]
    return torch.cat(values).mean().item()


def _eight_bit_pair(a: Tensor, b: Tensor, space: str, border: int) -> tuple[Tensor, Tensor]:
    """Return both images as float64 (B, 3, H, W), or (B, 1, H, W) for luma, in [0, 255]."""
    if a.shape != b.shape:
        raise ValueError(
            f"expected two images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "resize or crop one of them first"
        )
    if space not in ("rgb", "y"):
        raise ValueError(f"unknown colour space {space!r}; take rgb or y")
    pair = [_crop(_eight_bit(_check_images(x)), border) for x in (a, b)]
    return tuple(_luma(x) if space == "y" else x for x in pair)


def _check_images(images: Tensor) -> Tensor:
    """Return float images as (B, 3, H, W); ValueError for another kind, an empty batch or NaN."""
    if not images.is_floating_point() or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(
            f"expected float images (B, 3, H, W) or (3, H, W) in [-1, 1], got {images.dtype} "
            f"{tuple(images.shape)}; 8-bit images become such by image / 127.5 - 1"
        )
    if images.numel() == 0:
        raise ValueError(f"expected at least one image and pixel, got {tuple(images.shape)}")
    if images.isnan().any():
        raise ValueError("expected numbers in [-1, 1], got NaN; look where the image came from")
    return images if images.ndim == 4 else images.unsqueeze(0)


def _eight_bit(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the 256 levels, as float64 in [0, 255] on the CPU."""
    return ((images.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round()


def _crop(images: Tensor, border: int) -> Tensor:
    """Leave `border` pixels out on each side; ValueError unless something is left."""
    height, width = images.shape[-2:]
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(
            f"border is from 0 to less than half of the image's {height} x {width} pixels, "
            f"got {border}"
        )
    return images[..., border : height - border, border : width - border]


def _luma(images: Tensor) -> Tensor:
    """Return Y (B, 1, H, W) in [16, 235] of RGB images (B, 3, H, W) in [0, 255]: ITU-R BT.601."""
    weights = images.new_tensor([65.481, 128.553, 24.966]) / 255
    return 16 + (images * weights.view(3, 1, 1)).sum(dim=1, keepdim=True)


def _check_window_fits(images: Tensor) -> None:
    """Raise ValueError where the SSIM window is larger than the images."""
    height, width = images.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(
            f"SSIM needs {WINDOW} pixels a side after the border is left out, got {height} x "
            f"{width}; take larger images or a smaller border"
        )


def _check_pictures(images: dict[int | Size, Tensor], least: int) -> list[Tensor]:
    """Return the checked pictures, moved off devices that lack float64."""
    pictures = [_check_images(x) for x in images.values()]
    if len({len(x) for x in pictures}) != 1:
        raise ValueError(
            "expected pictures of the same latents at one size or more, got "
            f"{ {size: len(x) for size, x in images.items()} } pictures by size"
        )
    for size, x in zip(images, pictures, strict=True):
        height, width = check_size(size)
        if x.shape[-2:] != (height, width) or min(height, width) < least:
            raise ValueError(
                f"expected (N, 3, {height}, {width}) under {size!r}, sides of {least} or more, "
                f"got {tuple(x.shape)}"
            )
    return [x.cpu() if x.device.type == "mps" else x for x in pictures]


def check_features(features: Tensor) -> Tensor:
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
