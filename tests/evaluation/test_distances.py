"""Distances between sets: closed forms, hand values, prdc and torch-fidelity's own call."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from arbscale.evaluation import (
    distances,
    features,
    fid,
    interval,
    patch_frechet_distance,
    random_patches,
)
from arbscale.evaluation.distances import nearest_distances
from arbscale.evaluation.features import Extractor
from arbscale.metrics import frechet_distance, precision_recall


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def with_moments(n: int, mean, covariance, seed: int = 0) -> torch.Tensor:
    """Return n points whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def pictures(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand((n, 3, size, size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_must_be_sets_of_one_network():
    with pytest.raises(ValueError, match=r"2 images.*\(1, 3\)"):
        frechet_distance(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.tensor([[1.0, math.nan]] * 3), normal(5, 2))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        frechet_distance(torch.zeros(3), normal(5, 3))
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(normal(5, 3), normal(5, 4))


# --- Fréchet distance ---


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """For covariances that commute it is |mean difference|^2 + |difference of the roots|^2."""
    rotation = torch.linalg.qr(normal(3, 3, 1)).Q
    spread_a, spread_b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.25, 9.0])
    a, b = (rotation @ torch.diag(s.double()) @ rotation.T for s in (spread_a, spread_b))
    means = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 5.0]], dtype=torch.float64)
    expected = (1 + 4) + (1 - 2) ** 2 + (2 - 0.5) ** 2
    found = frechet_distance(with_moments(40, means[0], a), with_moments(30, means[1], b, 2))
    assert found == pytest.approx(expected, abs=1e-9)
    one = with_moments(9, means[0][:1], torch.eye(1).double() * 16)
    two = with_moments(9, means[0][:1] + 3, torch.eye(1).double() * 25)
    assert frechet_distance(one, two) == pytest.approx(9 + 1)


@pytest.mark.parametrize("n", [60, 12])  # 12 images leave 20 x 20 covariances singular
def test_frechet_distance_agrees_with_torch_fidelity(n):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = normal(n, 20), normal(n, 20, 1) @ normal(20, 20, 2) + 0.3
    theirs = fidelity.fid_statistics_to_metric(
        *(fidelity.fid_features_to_statistics(x) for x in (a, b)), False
    )
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_large_means_cost_no_digits():
    a, b = (normal(50, 6, seed) * torch.arange(1, 7) for seed in (0, 1))
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_identical_and_of_constant_sets():
    for n in (200, 5):  # also with a singular covariance
        x = normal(n, 30) * 100
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    constant = torch.full((4, 3), 2.0)
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, constant - 2) == pytest.approx(12)


# --- precision and recall ---


def test_precision_recall_by_hand():
    """On a line, k = 1: real balls reach 1 about 0 and 1, 8 about 2 ... 10 is 8 from 2."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [17.0], [30.0], [31.5]])
    # Real radii 1, 1, 1, 8: inside are 0.5 and 17. Generated radii 16.5, 13, 1.5, 1.5: all real.
    assert precision_recall(generated, real, k=1) == (0.5, 1.0)
    # Swapped, precision and recall swap.
    assert precision_recall(real, generated, k=1) == (1.0, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_agrees_with_prdc_and_torch_fidelity(k):
    prdc = pytest.importorskip("prdc")
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    generated, real = normal(300, 12) * 0.8 + 0.2, normal(250, 12, 1)
    theirs = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    ours = precision_recall(generated, real, k, block=64)
    assert 0.1 < ours[1] < ours[0] < 1
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]))
    assert ours == pytest.approx(
        fidelity.calculate_precision_recall_full(generated, real, k), abs=1e-6
    )
    assert ours == precision_recall(generated, real, k)  # whatever the blocks


def test_precision_recall_of_identical_constant_and_distant_sets():
    x = normal(40, 5)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)
    constant = torch.full((8, 5), 3.0)
    assert precision_recall(constant, constant) == (1, 1)
    assert precision_recall(x[:1].expand(8, -1), x)[1] <= 1 / 40  # one image covers itself


@pytest.mark.parametrize("block", [7, 1024])
def test_copies_are_at_distance_zero(block):
    """Radii of a generator that repeats itself are 0, and only the same points lie within."""
    x = normal(150, 768) + 3
    again = x.repeat(4, 1)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    assert precision_recall(x, again, block=block) == (1, 1)
    assert nearest_distances(again, x, block).max() == 0


def test_precision_recall_errors():
    with pytest.raises(ValueError, match=r"4 images.*\(3, 2\)"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="0"):
        precision_recall(normal(9, 2), normal(9, 2), k=0)
    with pytest.raises(ValueError, match="2 and 3"):
        precision_recall(normal(9, 2), normal(9, 3))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(normal(9, 2) * math.nan, normal(9, 2))


def test_interval_is_two_standard_errors():
    """The standard error of a mean of n draws is known: 1 / sqrt(n) of each set."""

    def means_apart(a, b):
        return (a.mean() - b.mean()).item(), 1.0

    found = interval(means_apart, normal(400, 1), normal(400, 1, 1), repeats=400)
    assert found == pytest.approx((2 * math.sqrt(1 / 400 + 1 / 400), 0), rel=0.15)
    again = interval(means_apart, normal(400, 1), normal(400, 1, 1), repeats=400)
    assert found == again


# --- FID, with a stand-in for Inception ---


@pytest.fixture
def stand_in(monkeypatch):
    """Put a small network where torch-fidelity keeps Inception, and its download out of reach."""
    base = pytest.importorskip("torch_fidelity.feature_extractor_base")
    registry = pytest.importorskip("torch_fidelity.registry")

    class StandIn(base.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            generator = torch.Generator().manual_seed(0)
            self.weight = nn.Parameter(torch.randn(6, 3, 4, 4, generator=generator) / 500)

        @staticmethod
        def get_provided_features_list():
            return ("2048",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "2048"

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (torch.conv2d(x.float(), self.weight, stride=4).mean((2, 3)).sin(),)

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", StandIn)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(distances, "FID_LEAST", 30)
    return StandIn


class Levels(torch.utils.data.Dataset):
    """Images as torch-fidelity wants them, 8 bits."""

    def __init__(self, images):
        self.images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_fid_agrees_with_torch_fidelitys_own_call(stand_in):
    fidelity = pytest.importorskip("torch_fidelity")
    a, b = pictures(50), pictures(40, seed=1) ** 3 * 1.2
    options = {"fid": True, "cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True}
    theirs = fidelity.calculate_metrics(input1=Levels(a), input2=Levels(b), **options)
    ours = fid(iter(a), iter(b))
    assert ours > 1e-3
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert patch_frechet_distance(a, b, features.extractor("inception")) == ours


def test_fid_refuses_few_images_unless_asked(stand_in):
    a, b = pictures(20), pictures(40, seed=1)
    with pytest.raises(ValueError, match="30 .*20.*allow_few=True"):
        fid(a, b)
    with pytest.warns(UserWarning, match="20"):
        assert fid(a, b, allow_few=True) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid(b, b) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["inception", "vgg16"])
def test_without_a_network_the_message_names_the_way_out(name, monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")

    def unreachable(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(FileNotFoundError, match="--features encoder.*") as caught:
        features.extractor(name)
    assert "not an FID" in str(caught.value) and "checkpoints" in str(caught.value)


# --- patches ---


def corner_means(images: torch.Tensor) -> torch.Tensor:
    return images.float()[:, :, :4, :4].mean((2, 3)) / 255


NETWORK = Extractor("test", "mean colour of a corner", 3, "0", corner_means)


def test_patches_have_the_scales_and_places_they_were_asked_for():
    asked = []

    def crop(i, size, window):
        asked.append((i, size, window))
        return torch.zeros(3, *window[2:])

    found = list(random_patches(crop, 5, 200, 8, (8, 12)))
    assert len(found) == 200 and {x.shape for x in found} == {(3, 8, 8)}
    assert {i for i, _, _ in asked} == set(range(5))
    assert {size for _, size, _ in asked} == {(s, s) for s in range(8, 13)}
    reach = {top + 8 for _, size, (top, *_) in asked if size == (12, 12)}
    assert reach == {8, 9, 10, 11, 12}
    with pytest.raises(ValueError, match="16 px"):
        next(random_patches(crop, 5, 1, 16, (8, 12)))


def test_patch_distance_of_identical_sets_is_zero_and_grows():
    images = pictures(30, 24)

    def crops(shift):
        def crop(i, size, window):
            top, left, height, width = window
            resized = torch.nn.functional.interpolate(images[i : i + 1], size)[0]
            return resized[:, top : top + height, left : left + width] * (1 - shift) + shift

        return random_patches(crop, 30, 60, 8, (8, 24), seed=3)

    assert patch_frechet_distance(crops(0), crops(0), NETWORK) == pytest.approx(0, abs=1e-9)
    near, far = (patch_frechet_distance(crops(0), crops(s), NETWORK) for s in (0.1, 0.5))
    assert 0 < near < far


def test_nearest_distances_by_hand():
    points, others = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[0.0, 1], [9, 12], [3, 4]])
    found = nearest_distances(points, others, block=1)
    assert found.tolist() == [1, 0] and found.dtype == torch.float64
