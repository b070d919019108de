"""Image files that are written: refused before the work, whole after it, with what they carry."""

import os

import numpy as np
import pytest
from PIL import Image

from arbscale.data import output


def photo(mode="RGB", height=20, width=30):
    size = (height, width, len(mode))
    small = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return Image.fromarray(small)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.png", (20, 30)),
        ("a.jpg", (20, 65_500)),
        ("a.webp", (16_383, 2)),
        ("a.gif", (1, 65_535)),
        ("a.tif", (70_000, 1)),
        ("a.bmp", (20, 70_000)),
        ("a.ppm", (20, 70_000)),
        ("a.ico", (100, 256)),
        ("deep/er/a.PNG", (20, 30)),
    ],
)
def test_what_can_be_written_passes_and_leaves_nothing(tmp_path, name, size):
    output.check_output(tmp_path / name, size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.psd", (20, 30)),
        ("a.mpg", (20, 30)),
        ("a.cur", (20, 30)),
        ("a.xbm", (20, 30)),
        ("a", (20, 30)),
        ("a.gif", (1, 70_000)),
        ("a.jpg", (65_501, 1)),
        ("a.webp", (1, 16_384)),
        ("a.ico", (300, 300)),
        ("a.icns", (300, 300)),
    ],
)
def test_what_cannot_be_written_is_refused_first(tmp_path, name, size):
    with pytest.raises(ValueError, match=name):
        output.check_output(tmp_path / name, size)
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for wrong in ("file/a.png", "folder.png"):
        with pytest.raises(OSError, match=wrong.partition("/")[0]):
            output.check_output(tmp_path / wrong, (20, 30))
    for quality in (0, 101):
        with pytest.raises(ValueError, match=str(quality)):
            output.check_output(tmp_path / "a.jpg", (20, 30), quality)


def test_a_lossy_file_keeps_full_colours(tmp_path):
    for quality in (95, 40):
        output.write_image(photo(), tmp_path / "a.jpg", quality)
        photo().save(tmp_path / "b.jpg", quality=quality, subsampling=0)
        assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    output.write_image(photo(), tmp_path / "a.webp", 95)
    photo().save(tmp_path / "b.webp", quality=95)
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()


@pytest.mark.parametrize(("ending", "mode"), [("png", "RGBA"), ("tif", "RGBA"), ("jpg", "RGB")])
def test_transparency_is_kept_or_laid_on_white(tmp_path, ending, mode):
    image = photo("RGBA")
    output.write_image(image, tmp_path / f"a.{ending}", 100)
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    with Image.open(tmp_path / f"a.{ending}") as written:
        assert written.mode == mode
        off = np.abs(np.asarray(written, int) - np.asarray(image if mode == "RGBA" else expected))
        assert off.max() <= (0 if mode == "RGBA" else 12)
    output.write_image(image, tmp_path / "a.ppm")
    with Image.open(tmp_path / "a.ppm") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))


def test_a_failure_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    output.write_image(photo(), path)
    before = path.read_bytes()

    def full(self, file, *args, **options):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        output.write_image(photo(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("source", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_is_kept_but_for_what_is_no_longer_true(tmp_path, source):
    exif = Image.Exif()
    exif[0x0112], exif[272], exif[33432] = 6, "a camera", "somebody"
    exif[34665] = {0xA002: 30, 0x829A: 0.5, 0xA001: 65535}
    exif[34853] = {1: "N"}
    photo().save(tmp_path / "in", source, exif=exif.tobytes())
    with Image.open(tmp_path / "in") as image:
        image.load()
        kept = output.kept_exif(image)
    for ending in ("jpg", "png", "webp", "tif"):
        output.write_image(photo(), tmp_path / f"out.{ending}", exif=kept)
        with Image.open(tmp_path / f"out.{ending}") as written:
            found = written.getexif()
            assert written.size == (30, 20)
            assert 0x0112 not in found and found[272] == "a camera" and found[33432] == "somebody"
            inner = found.get_ifd(34665)
            assert 0xA002 not in inner and inner[0x829A] == 0.5 and inner[0xA001] == 1
            assert found.get_ifd(34853)[1] == "N"


def test_a_description_that_no_format_holds_is_dropped(tmp_path):
    """Microscopes write theirs, of any length, into TIFF files."""
    for length, is_kept in ((60_000, True), (70_000, False)):
        photo().save(tmp_path / "in.tif", tiffinfo={270: "x" * length})
        with Image.open(tmp_path / "in.tif") as image:
            kept = output.kept_exif(image)
        assert bool(kept) == is_kept
        output.write_image(photo(), tmp_path / "out.jpg", exif=kept)


def test_an_image_without_exif_has_none_to_keep():
    assert output.kept_exif(photo()) == b""
