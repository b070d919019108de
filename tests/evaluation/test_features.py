"""The extractors, the search for their weights, and what is kept on disk."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from arbscale import ArbitraryScaleModel
from arbscale.data import ContinuousScenes, ImageFolder, resize, to_pil
from arbscale.evaluation import extractor, features
from arbscale.evaluation.features import (
    Extractor,
    alexnet_file,
    alexnet_state,
    fingerprint,
    reference_features,
)

WEIGHTS = Path(os.environ.get("ARBSCALE_WEIGHTS", "")).expanduser() / "alexnet_features.pth"
needs_weights = pytest.mark.skipif(
    not (os.environ.get("ARBSCALE_WEIGHTS") and WEIGHTS.is_file()),
    reason="ARBSCALE_WEIGHTS names no folder with alexnet_features.pth",
)


def pictures(n: int, size=64, seed: int = 0) -> torch.Tensor:
    shape = (n, 3, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Keep every cache in a fresh folder, and the network out of reach."""

    def unreachable(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)


@pytest.mark.slow
def test_encoder_features_are_means_over_quarters():
    network = extractor("encoder")
    images = pictures(5, 128)
    found = network(images)
    assert found.shape == (5, network.dimensions) and found.dtype == torch.float32
    encoder = ArbitraryScaleModel.load("photos-tiny").first_stage.encoder
    h = encoder.stem(((images + 1) * 127.5).round() / 127.5 - 1)
    for level, down in zip(encoder.levels, [*encoder.downs, torch.nn.Identity()], strict=True):
        h = down(level(h))
    h = F.silu(encoder.norm(encoder.middle(h)))
    half = h.shape[-1] // 2
    quarters = [h[..., :half, :half], h[..., :half, half:], h[..., half:, :half]]
    quarters = torch.stack([q.mean((2, 3)) for q in [*quarters, h[..., half:, half:]]], dim=2)
    torch.testing.assert_close(found, quarters.flatten(1).detach(), rtol=1e-3, atol=1e-4)
    assert str(network.dimensions) in network.label and "FID" not in network.label


@needs_weights
def test_alexnet_features_are_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    network = extractor("alexnet")
    images = pictures(3)
    model = torchvision.models.alexnet().eval()
    state = torch.load(WEIGHTS, weights_only=True)
    model.load_state_dict(state, strict=False)
    levels = ((images + 1) * 127.5).round() / 127.5 - 1
    normal = torchvision.transforms.functional.normalize(
        resize(levels, 224) / 2 + 0.5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    with torch.no_grad():
        expected = F.relu(model.features[:11](normal)).mean((2, 3))
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert network.dimensions == 256 == expected.shape[1]


def test_extractors_refuse_what_is_no_picture():
    network = Extractor("n", "n", 3, "0", lambda x: x.float().mean((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        network(torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'clip'.*encoder, alexnet"):
        extractor("clip")


def test_alexnet_is_searched_for_in_order(tmp_path, monkeypatch):
    own, cache = tmp_path / "own", tmp_path / "torch/hub/checkpoints"
    own.mkdir()
    cache.mkdir(parents=True)
    monkeypatch.delenv("ARBSCALE_WEIGHTS", raising=False)
    assert alexnet_file() is None
    with pytest.raises(FileNotFoundError, match="alexnet_features.pth.*ARBSCALE_WEIGHTS"):
        alexnet_state()
    state = {"features.0.weight": torch.ones(1), "classifier.1.weight": torch.ones(1)}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: state)
    assert list(alexnet_state()) == ["features.0.weight"]
    monkeypatch.setenv("ARBSCALE_WEIGHTS", str(own))
    torch.save({"features.0.weight": torch.zeros(2)}, own / "alexnet_features.pth")
    assert alexnet_file() == own / "alexnet_features.pth"
    assert alexnet_state()["features.0.weight"].shape == (2,)
    torch.save(state, cache / "alexnet-owt-7be5be79.pth")
    assert alexnet_file() == cache / "alexnet-owt-7be5be79.pth"


@pytest.mark.parametrize("name", ["inception", "vgg16", "alexnet"])
def test_weights_in_torch_hubs_cache_are_checked_by_their_hash(name, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    files = {
        "inception": "weights-inception-2015-12-05-6726825d.pth",
        "vgg16": "vgg16-397923af.pth",
        "alexnet": "alexnet-owt-7be5be79.pth",
    }
    path = tmp_path / "torch/hub/checkpoints" / files[name]
    path.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: torch.load(path))
    with pytest.raises(ValueError, match=path.name):
        extractor(name) if name in ("inception", "vgg16") else alexnet_state()
    digits = path.stem.rpartition("-")[2]
    monkeypatch.setattr(features, "sha256", lambda path: digits + "0" * 56)
    if name in ("inception", "vgg16"):  # all of their digits are known
        with pytest.raises(ValueError, match=features.SHA256[digits]):
            extractor(name)
    else:
        assert list(alexnet_state()) == ["features.0.weight"]


@pytest.mark.parametrize("name", ["inception", "vgg16", "alexnet"])
def test_downloads_are_checked_by_their_hash(name, monkeypatch):
    pytest.importorskip("torch_fidelity")

    def altered(url, check_hash=False, **options):
        if check_hash:
            raise RuntimeError("invalid hash value")
        pytest.fail("not checked")

    monkeypatch.delenv("ARBSCALE_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", altered)
    with pytest.raises(ValueError, match=name):
        extractor(name)


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99])
def test_a_file_of_something_else_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setenv("ARBSCALE_WEIGHTS", str(tmp_path))
    (tmp_path / "alexnet_features.pth").write_bytes(content)
    with pytest.raises(ValueError, match="alexnet_features.pth"):
        alexnet_state()


def mean_colours(images):
    return images.float().mean((2, 3))


COLOURS = Extractor("colours", "mean colours", 3, "first weights", mean_colours)


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 200])
def test_damaged_features_in_the_cache_are_computed_anew(damage, tmp_path, capsys):
    images = pictures(6)
    first = reference_features("64 px", images, COLOURS, lambda: images.split(2)).clone()
    (path,) = (tmp_path / "cache/features").iterdir()
    path.write_bytes(damage)
    assert torch.equal(reference_features("64 px", images, COLOURS, lambda: [images]), first)
    assert path.name in capsys.readouterr().err
    assert torch.equal(reference_features("64 px", images, COLOURS, pytest.fail), first)


def test_without_a_cache_the_features_are_computed_each_time(tmp_path, monkeypatch, capsys):
    images = pictures(6)
    first = reference_features("64 px", images, COLOURS, lambda: images.split(2))
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("ARBSCALE_CACHE", str(tmp_path / "a file/cache"))
    assert torch.equal(reference_features("64 px", images, COLOURS, lambda: [images]), first)
    assert "a file" in capsys.readouterr().err
    for name in ("HOME", "USERPROFILE", "ARBSCALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without a home
    assert torch.equal(reference_features("64 px", images, COLOURS, lambda: [images]), first)
    assert "ARBSCALE_CACHE" in capsys.readouterr().err

    def gone():
        raise FileNotFoundError("3.png")

    with pytest.raises(FileNotFoundError, match="3.png"):  # that is not the cache's fault
        reference_features("64 px", images, COLOURS, gone)


def test_reference_features_are_computed_once():
    calls = []

    def network(images):
        calls.append(len(images))
        return images.float().mean((2, 3))

    images = pictures(6)
    colours = Extractor("colours", "mean colours", 3, "first weights", network)
    first = reference_features("64 px", images, colours, lambda: images.split(2))
    assert first.shape == (6, 3) and calls == [2, 2, 2]
    again = reference_features("64 px", images, colours, lambda: images.split(2))
    assert torch.equal(first, again) and len(calls) == 3
    others = Extractor("colours", "mean colours", 3, "other weights", network)
    reference_features("64 px", images, others, lambda: images.split(2))
    reference_features("32 px", images, colours, lambda: images.split(2))
    reference_features("64 px", images[:4], colours, lambda: images[:4].split(2))
    assert len(calls) == 3 + 3 + 3 + 2


def test_fingerprints_tell_sets_apart(tmp_path):
    for i in range(2):
        to_pil(pictures(1, 16, seed=i)[0]).save(tmp_path / f"{i}.png")
    folder = fingerprint(ImageFolder(tmp_path))
    assert folder == fingerprint(ImageFolder(tmp_path))
    to_pil(pictures(1, 20)[0]).save(tmp_path / "1.png")
    assert folder != fingerprint(ImageFolder(tmp_path))
    scenes = [ContinuousScenes(9, 16, 0, "val"), ContinuousScenes(9, 16, 0, "test")]
    assert len({folder, *(fingerprint(x) for x in scenes), fingerprint(list(pictures(2)))}) == 4


def test_the_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    from arbscale.evaluation.features import cache_folder

    monkeypatch.delenv("ARBSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "arbscale"
