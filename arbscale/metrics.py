"""Metrics: one function each, all taking images in [-1, 1].

The definition is part of the number. PSNR and SSIM are those of the super-resolution benchmarks, on
images rounded to 8 bits; say with every result which colour space and which border it has. The
distances between sets take features, (N, D) for N images; which network made them is part of the
number. How sets pass through a network is in `evaluation`, as is the speed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import Size, check_size
from arbscale.store import InputError

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
    """Structural similarity, at most 1, which identical images have; arguments as for `psnr`.

    Gaussian window of 11 pixels with sigma 1.5, population covariance, mean over the places where
    the window fits, over channels, then over images, which are clamped and rounded to 8 bits.
    ValueError where less than 11 pixels a side are left within the border.
    Source: Wang et al. 2004.
    """
    a, b = _eight_bit_pair(a, b, space, border)  # (B, 3 or 1, H, W)
    if min(a.shape[-2:]) < WINDOW:
        raise InputError(f"SSIM needs {WINDOW} px a side within the border, got {tuple(a.shape)}")
    return _mean_in_chunks(lambda x, y: _ssim_terms(x, y, 255)[0], a, b, chunk=1)


def lpips(a: Tensor, b: Tensor) -> float:
    """Learned perceptual distance, v0.1 over AlexNet, at least 0, which identical images have.

    Takes float images (B, 3, H, W) or (3, H, W) in [-1, 1], at least 32 pixels a side, clamped;
    mean over the images. Computed by the package `lpips` (Zhang et al. 2018); AlexNet's ImageNet
    weights come from torch hub's cache, from the folder that ARBSCALE_WEIGHTS names, or by
    download, in this order. FileNotFoundError where none are found says how to get them.
    """
    a, b = _check_images(a, b)
    if min(a.shape[-2:]) < 32:
        raise InputError(f"LPIPS needs sides of 32 px, got {tuple(a.shape)}; take larger images")
    network = lpips_network().to(a.device)
    with torch.no_grad():
        pairs = zip(a.clamp(-1, 1).float(), b.clamp(-1, 1).float(), strict=True)
        return sum(network(x[None], y[None]).item() for x, y in pairs) / len(a)


def lpips_is_there() -> bool:
    """Tell whether the weights that `lpips` needs are found on this machine."""
    from arbscale.evaluation.features import alexnet_file

    return alexnet_file() is not None


@functools.cache
def lpips_network() -> torch.nn.Module:
    """Return the network behind `lpips`, loaded once and shared: it stays where it is moved."""
    import lpips as package

    from arbscale.evaluation.features import alexnet_state

    state = alexnet_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of arguments that the package still uses
        network = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    named = {name.split(".", 1)[1]: p for name, p in network.net.named_parameters()}
    with torch.no_grad():
        for name, parameter in named.items():  # "slice1.0.weight" there is "features.0.weight" here
            parameter.copy_(state[f"features.{name}"])
    return network.eval()


@torch.no_grad()
def self_ssim(images: dict[int | Size, Tensor], variant: str = "clean") -> Tensor:
    """Consistency over sizes: how similar the images of the same latents at sizes a and b are.

    No reference is needed, so a blurred image scores well: report it beside a measure of quality.

    Parameters
    ----------
    images
        Images of the same N latents by size: `{64: (N, 3, 64, 64), (75, 100): (N, 3, 75, 100)}`,
        floats in [-1, 1]; what lies outside is clamped.
    variant
        "clean": the image of size b is resized to size a with antialiased bicubic (a = -0.5, as
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
        raise InputError(f"unknown variant {variant!r}; take clean or scaleparty")
    by_size = _check_by_size(images, least=WINDOW if variant == "clean" else 16)
    rows = [[_mean_in_chunks(compare, a, b) for b in by_size] for a in by_size]
    return torch.tensor(rows, dtype=torch.float64)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between two sets, each taken for a Gaussian: 0 for the same moments.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, squared units of the features. It falls
    with the number of images, so compare only equal numbers. Fewer images than features leave the
    covariances singular: the formula holds, and the bias is large. The last trace is that of the
    singular values of `S_a^(1/2) S_b^(1/2)`, which needs no complex root. Takes features (N, D) and
    (M, D), at least two images each, and computes in float64.
    Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    a, b = check_features(a, b, least=2)
    step = a.mean(0) - b.mean(0)
    covariances = [torch.cov(x.T).view(x.shape[1], -1) for x in (a, b)]  # (D, D)
    overlap = torch.linalg.svdvals(_root(covariances[0]) @ _root(covariances[1])).sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * overlap
    return max(0.0, (step.square().sum() + spread).item())


def precision_recall(
    generated: Tensor, real: Tensor, k: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Improved precision and recall, both in [0, 1]: quality, and coverage of the real images.

    Each set is the union of balls around its images that reach to the k-th nearest neighbour in the
    set. Precision is the share of generated images inside the real set's balls, recall the share of
    real ones inside the generated set's. Both depend on the numbers of images. Takes features
    (N, D) and (M, D), more than k images each; k is at least 1. Implements Kynkäänniemi et al.
    2019, in float64; `block` rows of distances are held at a time.
    """
    if k < 1:
        raise InputError(f"k is at least 1, got {k}")
    generated, real = check_features(generated, real, least=k + 1)
    centre = real.mean(0)  # a distance keeps more digits near zero
    generated, real = generated - centre, real - centre

    def inside(points: Tensor, centres: Tensor) -> float:
        rows = [distances(x, centres).kthvalue(k + 1).values for x in centres.split(block)]
        radii = torch.cat(rows)  # to the k-th nearest other one: the nearest is itself
        rows = [(distances(x, centres) <= radii).any(1) for x in points.split(block)]
        return torch.cat(rows).double().mean().item()

    return inside(generated, real), inside(real, generated)


def _clean_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the single-scale SSIM (N,) of [-1, 1] images at a's size, b resized to it."""
    if a.shape != b.shape:
        b = F.interpolate(b, a.shape[-2:], mode="bicubic", antialias=True)
    return _ssim_terms(a + 1, b + 1, data_range=2)[0]


def _scaleparty_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the five-scale SSIM (N,) of images truncated to 8 bits at a's size, b resized to it.

    2x2 means lead from a scale to the next; an odd last row or column is dropped on the way.
    """
    b = F.interpolate(b, a.shape[-2:], mode="nearest")
    a, b = (((x + 1) * 127.5).floor() for x in (a, b))
    product = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale > 0:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)  # (N, C, H/2, W/2)
        full, contrast = _ssim_terms(a, b, data_range=255)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        product = product * (full if last else contrast).clamp(min=0) ** weight
    return product


def _ssim_terms(a: Tensor, b: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Return SSIM and its contrast-structure factor alone, means over each image, both (N,).

    The images (N, C, H, W) are in [0, `data_range`]. The window shrinks in proportion when a side
    is shorter, and stays inside the image.
    """
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


def _mean_in_chunks(
    compare: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, chunk: int = 16
) -> float:
    """Return the mean of `compare(a, b)` (N,), computed on a few images at a time."""
    pairs = zip(a.split(chunk), b.split(chunk), strict=True)
    return torch.cat([compare(*pair) for pair in pairs]).mean().item()


def _eight_bit_pair(a: Tensor, b: Tensor, space: str, border: int) -> tuple[Tensor, Tensor]:
    """Return both images within the border, 0 to 255, float64, (B, 3, H, W), luma (B, 1, H, W)."""
    a, b = _check_images(a, b)
    height, width = a.shape[-2:]
    if space not in ("rgb", "y"):
        raise InputError(f"unknown colour space {space!r}; take rgb or y")
    if not 0 <= 2 * border < min(height, width):
        raise InputError(f"a border of {border} px leaves nothing of {height} x {width} pixels")

    def levels(x: Tensor) -> Tensor:
        x = x[..., border : height - border, border : width - border].detach().cpu().double()
        x = ((x.clamp(-1, 1) + 1) * 127.5).round()
        if space == "rgb":
            return x
        weights = x.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255  # ITU-R BT.601
        return 16 + (x * weights).sum(dim=1, keepdim=True)

    return levels(a), levels(b)


def _check_images(*images: Tensor) -> list[Tensor]:
    """Return images as (B, 3, H, W); ValueError unless they are float, of one shape, not NaN."""
    for x in images:
        if x.shape != images[0].shape:
            raise InputError(f"expected one shape, got {tuple(images[0].shape)}, {tuple(x.shape)}")
        if not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] != 3 or not x.numel():
            found = f"{x.dtype} {tuple(x.shape)}"
            mend = "map 8 bits by x / 127.5 - 1"
            raise InputError(f"images are floats (B, 3, H, W) in [-1, 1], got {found}; {mend}")
        if x.isnan().any():
            raise InputError("expected images in [-1, 1], got NaN; look where they came from")
    return [x if x.ndim == 4 else x.unsqueeze(0) for x in images]


def _check_by_size(images: dict[int | Size, Tensor], least: int) -> list[Tensor]:
    """Return the checked images in [-1, 1] as float64, moved off devices that lack it."""
    numbers = [len(x) for x in images.values()]
    if len(set(numbers)) != 1:
        raise InputError(f"expected images of the same latents at each size, got {numbers}")
    checked = [_check_images(x)[0] for x in images.values()]
    for size, x in zip(images, checked, strict=True):
        height, width = check_size(size)
        if x.shape[-2:] != (height, width) or min(height, width) < least:
            wanted = f"(N, 3, {height}, {width}), sides of {least} or more"
            raise InputError(f"expected {wanted} under {size!r}, got {tuple(x.shape)}")
    return [(x.cpu() if x.device.type == "mps" else x).double().clamp(-1, 1) for x in checked]


def check_features(a: Tensor, b: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Return two sets of features (N, D) and (M, D), finite, as float64 on the CPU.

    ValueError for another form, different widths, or fewer than `least` images.
    """
    for x in (a, b):
        if x.ndim != 2 or not x.is_floating_point() or len(x) < least or not x.isfinite().all():
            found = f"{x.dtype} {tuple(x.shape)}"
            raise InputError(
                f"expected features (N, D) of {least} images or more, no NaN, got {found}"
            )
    if a.shape[1] != b.shape[1]:
        raise InputError(f"expected features of one network, got {a.shape[1]} and {b.shape[1]}")
    return a.detach().cpu().double(), b.detach().cpu().double()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances (N, M) between features (N, D) and (M, D), 0 between equal ones.

    `torch.cdist` multiplies matrices, which is fast, but leaves some 1e-8 of a norm between copies.
    """
    noise = 1e-6 * torch.maximum(a.norm(dim=1)[:, None], b.norm(dim=1))
    found = torch.cdist(a, b)
    return found.masked_fill_(found < noise, 0)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
