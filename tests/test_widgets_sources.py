"""Images of any size, by windows, and what goes into and out of an explorer."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import arbscale
from arbscale import presets
from arbscale.coords import scaled_size
from arbscale.data import resize, to_tensor
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import Sampling
from arbscale.widgets import sources
from arbscale.widgets.sources import (
    OwnOutput,
    Painted,
    Photo,
    Resized,
    mixed_latent,
    read_photo,
    rendered_png,
    slerp,
)
from arbscale.widgets.subjects import opened


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return ArbitraryScaleModel(presets.tiny()).eval()


@pytest.fixture(scope="module", autouse=True)
def several_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arbscale.model.LARGEST", 1)
        yield


@pytest.fixture(scope="module")
def enlarger():
    return arbscale.load("photos")


@pytest.fixture(scope="module")
def enlarged(enlarger):
    low = resize(image(9, 12), (30, 61))
    return sources.enlarge(enlarger, low, Sampling(1), lambda done, total: None)


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 9), (20, 31), (64, 300), (19, 12)])
def test_bicubic_is_the_houses(size):
    whole = sources.bicubic(image(20, 31), size).clamp(-1, 1)
    assert torch.allclose(whole, resize(image(20, 31), size), atol=1e-5)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (64, 300)])
def test_a_resized_window_is_a_crop(size, nearest):
    source = Resized(image(20, 31), nearest)
    whole = source.render(size, (0, 0, *size))
    assert torch.allclose(source.render(size, (2, 3, 4, 5)), whole[:, 2:6, 3:8], atol=1e-6)


def test_nearest_is_torchs():
    wanted = torch.nn.functional.interpolate(image(5, 7)[None], (13, 16), mode="nearest-exact")[0]
    assert torch.equal(Resized(image(5, 7), nearest=True).render((13, 16), (0, 0, 13, 16)), wanted)


def test_a_painted_window_is_a_crop(generator):
    z = mixed_latent(generator, (0, 1), steps=2)
    source = Painted.of(generator.first_stage, z, (32, 32))
    whole = source.render((50, 40), (0, 0, 50, 40))
    assert torch.allclose(source.render((50, 40), (11, 7, 20, 9)), whole[:, 11:31, 7:16], atol=1e-5)
    own = OwnOutput(source, (32, 32))
    wanted = resize(source.render((32, 32), (0, 0, 32, 32)), (50, 40))
    assert torch.allclose(own.render((50, 40), (0, 0, 50, 40)), wanted, atol=1e-5)


def test_an_enlarged_window_is_a_crop(enlarged):
    whole = enlarged.render((100, 200), (0, 0, 100, 200))
    part = enlarged.render((100, 200), (31, 70, 40, 90))
    assert torch.allclose(part, whole[:, 31:71, 70:160], atol=1e-4)


@pytest.mark.parametrize(("scale", "levels"), [(0.6, 2.0), (2.5, 1.0), (6.3, 1.0)])
def test_enlarged_is_what_the_model_upscales(enlarger, enlarged, scale, levels):
    size = scaled_size(enlarged.base, scale)
    wanted = enlarger.upscale(enlarged.low, size=size, steps=1)
    found = enlarged.render(size, (0, 0, *size))
    assert (found - wanted).abs().mean() * 127.5 < levels


def test_a_function_renders():
    for shape in ((3,), (1, 3)):  # one image, or a batch of one
        source = sources.as_source(lambda size, window, s=shape: 2 * torch.ones(*s, *window[2:]))
        assert torch.equal(source.render((8, 8), (0, 0, 2, 3)), torch.ones(3, 2, 3))
    assert isinstance(sources.as_source(image(4, 5)), Resized)


def test_a_large_file_is_rendered_in_strips(monkeypatch):
    monkeypatch.setattr(sources, "STRIP", 100)
    told = []
    content = rendered_png(
        Resized(image(4, 4)), (60, 30), (1, 2, 50, 20), lambda *t: told.append(t)
    )
    wanted = Resized(image(4, 4)).render((60, 30), (1, 2, 50, 20))
    found = to_tensor(Image.open(io.BytesIO(content)))
    assert (found - wanted).abs().max() < 1 / 127
    assert told[-1] == (50, 50) and len(told) == 10


# Latents ------------------------------------------------------------------------------------------


def test_slerp_ends_on_both_and_keeps_the_norm():
    a, b = image(40, 40), torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(1))
    a = a / a.norm() * b.norm()
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    assert slerp(a, b, 0.5).norm() == pytest.approx(float(a.norm()), rel=1e-4)
    assert torch.allclose(slerp(a, a, 0.3), a)


def test_a_mix_of_nothing_is_the_models_sample(generator):
    z = mixed_latent(generator, (5, 6), 0.0, steps=3)
    assert torch.equal(z, generator.sample(1, seed=5, steps=3))
    other = mixed_latent(generator, (5, 6), 1.0, steps=3)
    assert torch.allclose(other, generator.sample(1, seed=6, steps=3), atol=1e-5)


# Photographs --------------------------------------------------------------------------------------


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def test_a_photograph_is_read():
    array = np.arange(60, dtype="uint8").reshape(4, 5, 3)
    assert torch.equal(read_photo(png(array), "a.png"), to_tensor(array))


@pytest.mark.parametrize("content", [b"", b"no image", png(np.zeros((9, 9, 3), "uint8"))[:45]])
def test_what_is_no_photograph_is_refused_by_its_name(content):
    with pytest.raises(ValueError, match="^photo.png: ") as caught:
        read_photo(content, "../folder/photo.png")
    assert "folder" not in str(caught.value) and "/tmp" not in str(caught.value)


@pytest.mark.slow
def test_a_bomb_is_refused():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "png")
    with pytest.raises(ValueError, match="pixels"):
        read_photo(buffer.getvalue(), "bomb.png")


def test_a_large_photograph_is_its_own_truth():
    large = Photo.reduced(image(50, 100), "a.png", 40)
    assert large.low.shape == (3, 20, 40) and large.truth.shape == (3, 50, 100)
    assert "ground truth" in large.note
    small = Photo.reduced(image(30, 20), "a.png", 40)
    assert small.low.shape == (3, 30, 20) and small.truth is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_images_on_a_gpu_are_shown():
    """On the CPU, where what a browser shows is made."""
    given = image(6, 8).cuda()
    assert opened(given, 4, {}).low.device.type == "cpu"
    assert sources.as_source(given).render((5, 5), (0, 0, 5, 5)).device.type == "cpu"
