"""What the values of a file mean: every kind against a reference that does not come from PIL."""

import warnings

import image_formats
import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import data
from arbscale.data import images, pixels
from arbscale.data.folders import check_file
from arbscale.data.images import open_image, open_upright

CASES = image_formats.cases()


def levels(image):
    """Return an image tensor as levels (H, W, 3) of 255."""
    array = image.permute(1, 2, 0).numpy()
    return array.astype(float) if array.dtype == np.uint8 else (array + 1) * 127.5


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_its_reference_or_refused(tmp_path, name):
    case, path = CASES[name], tmp_path / name
    path.write_bytes(case.data)
    said = check_file(tmp_path, name)
    if case.rgb is None:
        with pytest.raises(ValueError, match=f"{name}.*{case.note}"):
            data.load_image(path)
        assert case.note in said.problem
        return
    with open_image(path) as image:
        rgb, alpha, notes = open_upright(image)
    assert np.abs(levels(rgb) - case.rgb).max() <= case.off
    assert (alpha is None) == (case.alpha is None)
    assert case.note in "; ".join(notes) and bool(case.note) == bool(notes)
    assert set(notes) <= set(said.conversions) and said.size == rgb.shape[1:]
    share = 1 if alpha is None else case.alpha[..., None] / 255
    if alpha is not None:
        assert np.array_equal(alpha[0].numpy(), case.alpha)
    laid = case.rgb * share + 255 * (1 - share)
    assert np.abs(levels(data.load_image(path)) - laid).max() <= case.off + 0.5


@pytest.mark.parametrize("name", ["orientation-6.png", "adobe.png", "12-grey.tif"])
def test_an_image_of_ones_own_is_read_as_its_file(tmp_path, name):
    (tmp_path / name).write_bytes(CASES[name].data)
    with Image.open(tmp_path / name) as image:
        assert torch.equal(data.to_tensor(image), data.load_image(tmp_path / name))


def test_a_profile_that_is_srgb_changes_nothing():
    from PIL import ImageCms

    image = Image.fromarray(image_formats.RGB)
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb, _, notes = open_upright(image)
    assert not notes and np.array_equal(levels(rgb), image_formats.RGB)


def test_a_profile_that_changes_no_deep_grey_leaves_it_whole(tmp_path):
    from PIL import ImageCms

    grey = np.arange(0, 65536, 7, dtype=np.uint16)[: 90 * 100].reshape(90, 100)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    expected = torch.from_numpy(grey.astype("float32") / 32767.5 - 1)
    for i, profile in enumerate((b"damaged", srgb)):  # the latter is one of RGB
        Image.fromarray(grey).save(tmp_path / f"{i}.png", icc_profile=profile)
        found = data.load_image(tmp_path / f"{i}.png")
        torch.testing.assert_close(found, expected.expand(3, -1, -1), atol=1e-6, rtol=0)
        assert images.load_pixels(tmp_path / f"{i}.png").shape == (3, 90, 100)


def test_transparency_is_laid_on_white_as_pil_does():
    value, alpha = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    image = Image.fromarray(np.dstack([value] * 3 + [alpha]))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    laid = pixels.on_white(*open_upright(image)[:2])
    assert np.array_equal(levels(laid), np.asarray(expected))


def test_a_large_image_is_converted_in_bands(monkeypatch):
    image = Image.fromarray(np.dstack([image_formats.RGB, image_formats.GREY]))
    whole = data.to_tensor(image)
    monkeypatch.setattr(pixels, "BAND", 15)
    assert torch.equal(data.to_tensor(image), whole)


def test_deep_grey_is_held_once_and_reduced_in_bands(monkeypatch):
    """Of an image of 120 megapixels three planes of floats take 1.4 GB."""
    image = Image.fromarray(image_formats.GREY.astype("uint16") * 257)
    assert open_upright(image)[0].untyped_storage().nbytes() == 4 * image_formats.GREY.size
    reduced, original = [], images.to_uint8
    monkeypatch.setattr(images, "to_uint8", lambda x: reduced.append(x) or original(x))
    monkeypatch.setattr(pixels, "BAND", 15)
    upright, _ = images.to_upright(image)
    assert np.array_equal(np.asarray(upright)[..., 0], image_formats.GREY)
    assert len(reduced) == image_formats.HEIGHT


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_clear_pixels_take_the_colours_around_them(kind):
    rgb = torch.zeros(3, 5, 7, dtype=kind)
    alpha = torch.zeros(1, 5, 7, dtype=torch.uint8)
    rgb[:, 1:4, 2:5], alpha[:, 1:4, 2:5] = 1, 9
    assert torch.equal(pixels.fill_clear(rgb, alpha), torch.ones_like(rgb))
    rgb[:, 2, 3] = 0
    kept = pixels.fill_clear(rgb, alpha)
    assert torch.equal(kept[:, 1:4, 2:5], rgb[:, 1:4, 2:5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixels.fill_clear(rgb, torch.zeros_like(alpha)), rgb)


def test_eight_bits_are_never_held_as_floats(tmp_path, monkeypatch):
    """Of an image of 120 megapixels they take 1.4 GB."""
    Image.fromarray(np.dstack([image_formats.RGB, image_formats.GREY])).save(tmp_path / "a.png")
    expected = data.to_uint8(data.load_image(tmp_path / "a.png"))
    monkeypatch.setattr(torch.Tensor, "float", lambda image: pytest.fail("floats"))
    assert torch.equal(images.load_pixels(tmp_path / "a.png"), expected)
    assert not check_file(tmp_path, "a.png").problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resize_takes_any_float(dtype):
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)
    found = images.resize(image.to(dtype), (5, 7))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), images.resize(image, (5, 7)), atol=0.01, rtol=0)
