"""The metrics against hand values, scikit-image and the published code's numbers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from arbscale.data import load_image
from arbscale.metrics import lpips, lpips_is_there, lpips_network, psnr, self_ssim, ssim

GOLDEN = Path(__file__).parent / "golden" / "selfssim.safetensors"


def images(seed: int = 0, shape=(2, 3, 24, 30)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(size, n: int = 2, seed: int = 0) -> torch.Tensor:
    """Return smooth images, the same at every size."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand((n, 3, 5, 5), generator=generator) * 1.6 - 0.8
    return F.interpolate(grid, size, mode="bilinear", align_corners=False)


def levels(value: float, size: int = 16) -> torch.Tensor:
    """Return a flat image of one 8-bit level."""
    return torch.full((3, size, size), value / 127.5 - 1)


def to_bytes(x: torch.Tensor) -> np.ndarray:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).numpy()


# --- PSNR ---


def test_psnr_by_hand():
    assert psnr(levels(100), levels(116)) == pytest.approx(20 * math.log10(255 / 16))
    luma = 16 * (65.481 + 128.553 + 24.966) / 255  # of 16 levels of grey
    expected = 20 * math.log10(255 / luma)
    assert psnr(levels(100), levels(116), space="y") == pytest.approx(expected)
    assert expected - psnr(levels(100), levels(116)) == pytest.approx(1.32, abs=0.01)


def test_psnr_of_one_primary_in_y():
    red = levels(0)
    red[0] = 1.0
    assert psnr(red, levels(0), space="y") == pytest.approx(20 * math.log10(255 / 65.481))


@pytest.mark.slow
def test_psnr_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    color = pytest.importorskip("skimage.color")
    a, b = images(0), images(1)
    pairs = list(zip(to_bytes(a), to_bytes(b), strict=True))
    rgb = [metrics.peak_signal_noise_ratio(x, y) for x, y in pairs]
    assert psnr(a, b) == pytest.approx(np.mean(rgb), abs=1e-9)
    luma = [[color.rgb2ycbcr(x)[3:-3, 3:-3, 0] for x in pair] for pair in pairs]
    y = [metrics.peak_signal_noise_ratio(*pair, data_range=255) for pair in luma]
    assert psnr(a, b, space="y", border=3) == pytest.approx(np.mean(y), abs=1e-6)


def test_psnr_is_the_mean_over_images_not_over_errors():
    a = torch.stack([levels(100), levels(100)])
    b = torch.stack([levels(101), levels(164)])
    assert psnr(a, b) == pytest.approx((psnr(a[0], b[0]) + psnr(a[1], b[1])) / 2)


def test_psnr_rounds_and_clamps():
    assert psnr(levels(100), levels(100.4)) == math.inf
    assert psnr(levels(255), torch.full((3, 16, 16), 7.0)) == math.inf
    assert psnr(levels(100), levels(100.6)) == pytest.approx(20 * math.log10(255))


def test_border_is_left_out():
    a = levels(100)
    b = a.clone()
    b[:, 0] = b[:, :, -1] = 1.0
    assert psnr(a, b) < 20
    assert psnr(a, b, border=1) == math.inf
    assert ssim(a, b, border=1) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_psnr_takes_any_float(dtype):
    assert psnr(images(0).to(dtype), images(1).to(dtype)) == pytest.approx(
        psnr(images(0), images(1)), abs=1e-2
    )


# --- SSIM ---


def test_ssim_of_flat_images_by_hand():
    """Without structure the luminance term is all there is."""
    x, y = 100 / 255, 180 / 255
    expected = (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4)
    assert ssim(levels(100), levels(180)) == pytest.approx(expected)


def test_ssim_agrees_with_scikit_image_on_bytes():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = smooth(40), (smooth(40) + 0.3 * images(2, (2, 3, 40, 40)))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        metrics.structural_similarity(x, y, channel_axis=2, data_range=255, **options)
        for x, y in zip(to_bytes(a), to_bytes(b), strict=True)
    ]
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-9)
    assert ssim(a[0], b[0]) == pytest.approx(expected[0], abs=1e-9)


def test_ssim_of_identical_and_of_unrelated_images():
    assert ssim(images(0), images(0)) == pytest.approx(1)
    assert ssim(images(0), images(0), space="y") == pytest.approx(1)
    assert abs(ssim(images(0, (2, 3, 64, 64)), images(1, (2, 3, 64, 64)))) < 0.05


def test_metrics_take_what_has_a_gradient():
    a = images(0).requires_grad_()
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1)
    assert not self_ssim({(24, 30): a}).requires_grad


def test_ssim_needs_room_for_its_window():
    assert ssim(images(0, (3, 11, 11)), images(0, (3, 11, 11))) == pytest.approx(1)
    with pytest.raises(ValueError, match="10, 12"):
        ssim(images(0, (3, 10, 12)), images(1, (3, 10, 12)))
    with pytest.raises(ValueError, match="10, 10"):
        ssim(images(0, (3, 14, 14)), images(1, (3, 14, 14)), border=2)


# --- errors of both ---


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_errors_say_what_came(metric):
    a = images(0)
    with pytest.raises(ValueError, match=r"\(2, 3, 24, 30\).*\(3, 24, 30\)"):
        metric(a, a[0])
    with pytest.raises(ValueError, match="torch.uint8"):
        metric(a.to(torch.uint8), a)
    with pytest.raises(ValueError, match=r"\(2, 24, 30, 3\)"):
        metric(a.movedim(1, 3), a.movedim(1, 3))
    with pytest.raises(ValueError, match="'lab'.*rgb or y"):
        metric(a, a, space="lab")
    for border in (-1, 12):
        with pytest.raises(ValueError, match=f"{border} .*24 x 30"):
            metric(a, a, border=border)
    with pytest.raises(ValueError, match="NaN"):
        metric(a, torch.full_like(a, math.nan))
    with pytest.raises(ValueError, match=r"\(0, 3, 24, 30\)"):
        metric(a[:0], a[:0])


# --- LPIPS ---

WEIGHTS = Path(os.environ.get("ARBSCALE_WEIGHTS", "")).expanduser()
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "alexnet_features.pth").is_file(),
    reason="ARBSCALE_WEIGHTS names no folder with alexnet_features.pth",
)


@pytest.mark.skipif(
    not (WEIGHTS / "lpips_example").is_dir(), reason="ARBSCALE_WEIGHTS has no lpips_example"
)
@needs_weights
def test_lpips_gives_the_published_example():
    reference, *others = (
        load_image(WEIGHTS / "lpips_example" / f"{name}.png")
        for name in ("ex_ref", "ex_p0", "ex_p1")
    )
    assert [lpips(x, reference) for x in others] == pytest.approx([0.722, 0.138], abs=5e-4)
    assert lpips_is_there()
    assert lpips(reference, reference) == 0
    both = lpips(torch.stack(others), torch.stack([reference, reference]))
    assert both == pytest.approx((0.722 + 0.138) / 2, abs=5e-4)


def test_lpips_errors(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="32 px.*24, 30"):
        lpips(images(0), images(1))
    with pytest.raises(ValueError, match="NaN"):
        lpips(smooth(32) * math.nan, smooth(32))

    def unreachable(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ARBSCALE_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    lpips_network.cache_clear()
    assert not lpips_is_there()
    with pytest.raises(FileNotFoundError, match="alexnet_features.pth"):
        lpips(smooth(32), smooth(32))


# --- SelfSSIM ---


def test_self_ssim_agrees_with_the_published_code():
    with safe_open(GOLDEN, "pt") as file:
        scores = json.loads(file.metadata()["scores"])
        pictures = {s: file.get_tensor(f"image_{s}") for s in (128, 160, 192)}
    matrix = self_ssim(pictures, variant="scaleparty")
    assert matrix.dtype == torch.float64 and matrix.shape == (3, 3)
    for i, a in enumerate(pictures):
        for j, b in enumerate(pictures):
            assert matrix[i, j].item() == pytest.approx(scores[f"{a}_{b}"], abs=1e-4)


def test_clean_self_ssim_agrees_with_scikit_image():
    """In both directions, with the antialiased bicubic resize written out."""
    metrics = pytest.importorskip("skimage.metrics")
    pictures = {32: smooth(32) + 0.1 * images(1, (2, 3, 32, 32)), (48, 40): smooth((48, 40))}
    matrix = self_ssim(pictures, variant="clean")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i, a in enumerate(pictures.values()):
        for j, b in enumerate(pictures.values()):
            resized = F.interpolate(
                b.double().clamp(-1, 1), a.shape[-2:], mode="bicubic", antialias=True
            )
            pairs = zip(a.clamp(-1, 1).double().numpy() + 1, resized.numpy() + 1, strict=True)
            expected = [
                metrics.structural_similarity(x, y, channel_axis=0, data_range=2, **options)
                for x, y in pairs
            ]
            assert matrix[i, j].item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_clean_resize_is_pils():
    image = pytest.importorskip("PIL.Image")
    plane = smooth(40, 1)[0, 0]
    theirs = np.asarray(image.fromarray(plane.numpy()).resize((23, 23), image.Resampling.BICUBIC))
    ours = F.interpolate(plane[None, None], (23, 23), mode="bicubic", antialias=True)[0, 0]
    torch.testing.assert_close(ours, torch.from_numpy(theirs.copy()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["clean", "scaleparty"])
def test_self_ssim_of_identical_and_of_unrelated_pictures(variant):
    same = self_ssim({64: smooth(64), 96: smooth(96)}, variant)
    torch.testing.assert_close(same.diagonal(), torch.ones(2, dtype=torch.float64))
    assert (same > 0.9).all()
    noise = {64: images(0, (2, 3, 64, 64)), 96: images(1, (2, 3, 96, 96))}
    matrix = self_ssim(noise, variant)
    assert matrix[0, 1].abs() < 0.1 and matrix[1, 0].abs() < 0.1
    flat = {64: torch.zeros(1, 3, 64, 64), 96: torch.zeros(1, 3, 96, 96)}
    torch.testing.assert_close(self_ssim(flat, variant), torch.ones(2, 2, dtype=torch.float64))


def test_self_ssim_rows_are_the_size_measured_at():
    """Detail that only the large image has is lost when measured at the small size."""
    detailed = smooth(96)
    detailed[..., ::2, ::2] += 0.15
    detailed[..., 1::2, 1::2] -= 0.15
    matrix = self_ssim({96: detailed, 48: smooth(48)}, "clean")
    assert matrix[1, 0] > 0.9 > matrix[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["clean", "scaleparty"])
def test_self_ssim_does_not_depend_on_the_batch(variant):
    """35 images go through in chunks; the result is the mean of each alone."""
    small = smooth(32, 35) + 0.2 * images(0, (35, 3, 32, 32))
    large = smooth(40, 35)
    whole = self_ssim({32: small, 40: large}, variant)
    alone = [
        self_ssim({32: s[None], 40: b[None]}, variant) for s, b in zip(small, large, strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean(0))


def test_self_ssim_takes_odd_and_oblong_sizes():
    matrix = self_ssim({(33, 50): smooth((33, 50)), 37: smooth(37)}, "scaleparty")
    assert ((matrix > 0.8) & (matrix < 1 + 1e-9)).all()


def test_self_ssim_errors():
    with pytest.raises(ValueError, match="'other'.*clean or scaleparty"):
        self_ssim({32: smooth(32)}, "other")
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        self_ssim({32: smooth(32, 2), 40: smooth(40, 3)})
    with pytest.raises(ValueError, match=r"\[\]"):
        self_ssim({})
    with pytest.raises(ValueError, match=r"\(N, 3, 40, 40\).*\(2, 3, 32, 32\)"):
        self_ssim({40: smooth(32)})
    with pytest.raises(ValueError, match="11"):
        self_ssim({10: smooth(10)})
    with pytest.raises(ValueError, match="16"):
        self_ssim({15: smooth(15)}, "scaleparty")
    with pytest.raises(ValueError, match="NaN"):
        self_ssim({16: torch.full((1, 3, 16, 16), math.nan)})
