"""The notebooks' pictures: what is drawn, what is refused, and that nothing leaks."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from arbscale import viz

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch):
    """Collect every image that is shown, as an array (H, W, 3), with its alternative text."""
    plt.switch_backend("Agg")
    shown = []

    def collect(data, metadata, raw):
        assert raw and metadata["image/png"]["alt"] == data["text/plain"]
        with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
            is_plot = data["text/plain"].startswith("plot: ")
            assert metadata["image/png"].get("width") == (image.width // 2 if is_plot else None)
            shown.append((np.asarray(image.convert("RGB")), data["text/plain"]))

    monkeypatch.setattr("IPython.display.display", collect)
    yield shown
    assert not plt.get_fignums(), "a figure stayed open"


def picture(height=20, width=None, level=0.0):
    return torch.full((3, height, width or height), level)


def count(array, colour):
    return int((array == colour).all(-1).sum())


RED = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)


def test_show_takes_one_a_batch_or_a_list(drawn):
    assert viz.show(picture()) is None
    viz.show(torch.zeros(12, 3, 8, 8), columns=4)
    viz.show([picture(9), picture(30, 50)], titles=["small", "large"])
    assert ["1 image, 20" in drawn[0][1], "12 images" in drawn[1][1]] == [True, True]
    assert "small, large" in drawn[2][1] and "30 × 50" in drawn[2][1]


@pytest.mark.parametrize(("side", "shown"), [(16, 160), (64, 192), (96, 192), (237, 237)])
def test_small_images_grow_by_a_whole_factor_and_others_keep_their_pixels(drawn, side, shown):
    viz.show([RED.expand(3, side, side)] * 2)
    assert count(drawn[0][0], (255, 0, 0)) == 2 * shown**2


@pytest.mark.slow
def test_no_row_is_wider_than_the_page(drawn):
    viz.show(torch.zeros(7, 3, 237, 237))
    viz.show(torch.zeros(1, 3, 10, 2000))
    viz.show_scales([picture(n) for n in (8, 16, 32, 64, 128, 900)])
    viz.zoom_strip([picture(900)] * 4, (0, 0, 5, 90))
    viz.pipeline("liif")
    *sheets, plot = (array.shape[1] for array, _ in drawn)
    assert max(*sheets, plot / 2) <= viz.PAGE + 2 * viz.GAP  # a plot has two pixels for one


def test_show_scales_fills_equal_boxes_and_writes_sizes(drawn):
    viz.show_scales([RED.expand(3, n, n) for n in (16, 37, 400)])
    array, text = drawn[0]
    assert count(array, (255, 0, 0)) % 3 == 0 and "16 × 16, 37 × 37, 400 × 400" in text


def test_an_image_enlarged_by_a_fraction_has_pixels_of_equal_size(drawn):
    viz.show_scales([torch.eye(37).expand(3, -1, -1)])
    array, _ = drawn[0]
    box = array[: array.shape[0] - 18, viz.GAP : -viz.GAP].astype(float)  # without the size
    bright = box.mean(axis=(0, 2))  # of each column: one pixel of 37
    assert bright.std() < 0.02 * bright.mean()


def test_a_label_that_fits_nowhere_is_cut_to_nothing_but_dots():
    sheet = viz.contact_sheet([(RED.expand(3, 4, 4), "10")], box=4)
    assert sheet.width == 4 + 2 * viz.GAP


def test_zoom_strip_shows_the_same_part_of_every_size(drawn):
    large, small = picture(100, 60, 1.0), picture(50, 30, 1.0)
    large[:, 50:70, 30:45] = RED
    small[:, 25:35, 15:23] = RED
    viz.zoom_strip([large, small], (50, 30, 20, 14), titles=["large", "small"])
    array, text = drawn[0]
    assert text == "an image of 100 × 60 and its part, from large, small"
    viz.zoom_strip([large, small], (50, 30, 20, 14))
    assert drawn[1][1] == "an image of 100 × 60 and its part"
    filled = (array == (255, 0, 0)).all(-1).sum(0)  # red pixels in each column
    assert (
        filled[array.shape[1] // 2] == filled[-20] == 240
    )  # both parts are red from top to bottom


def test_a_plot_is_described_by_its_labels(drawn):
    figure, axis = plt.subplots()
    axis.plot([1, 2], label="a curve")
    axis.set(title="$t$ and loss", xlabel="step")
    axis.legend()
    viz.show_plot()
    assert drawn[0][1] == "plot: t and loss, step, a curve"


@pytest.mark.slow
def test_the_pipeline_shows_what_is_asked_for(drawn):
    viz.pipeline()
    viz.pipeline("decoder", "liif")
    accent = tuple(bytes.fromhex(viz.ACCENT[1:]))
    assert count(drawn[0][0], accent) == 0 < count(drawn[1][0], accent)
    with pytest.raises(ValueError, match="discriminator"):
        viz.pipeline("discriminator")


def test_what_cannot_be_shown_is_refused(drawn):
    with pytest.raises(ValueError, match="titles"):
        viz.show([picture(), picture()], titles=["one"])
    with pytest.raises(ValueError, match="at least one"):
        viz.show([])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        viz.show(torch.zeros(1, 20, 20))
    with pytest.raises(ValueError, match="NaN"):
        viz.show(torch.full((3, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="window"):
        viz.zoom_strip(picture(), (0, 0, 21, 5))
    assert not drawn


def test_contact_sheet_keeps_pixels_and_aspect():
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    sheet = viz.contact_sheet(
        [(red.expand(3, 2, 1), "two × one"), (red.expand(3, 64, 64), "")], box=64
    )
    colours = sheet.convert("RGB").getcolors(1 << 16)
    exact = {colour: count for count, colour in colours}
    assert exact[(255, 0, 0)] == 64 * 32 + 64 * 64  # nothing smoothed, nothing stretched


def test_contact_sheet_wraps_and_cuts_long_labels():
    items = [(picture(8), "a label much longer than its box " * 9)] * 7
    wide, tall = viz.contact_sheet(items, columns=3, box=100).size
    assert 300 < wide < 340 and 300 < tall < 500
    wide = [viz.contact_sheet([(picture(8), text)], box=100).size for text in ("x", "x" * 99)]
    assert wide[0] == wide[1]
    with pytest.raises(ValueError, match="at least one"):
        viz.contact_sheet([])


@pytest.mark.slow
def test_importing_needs_no_matplotlib():
    import subprocess
    import sys

    code = "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None; "
    code += "sys.modules['skimage'] = None; import arbscale.viz, arbscale.data"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wide_image_grows_by_its_height(drawn):
    viz.show([RED.expand(3, 60, 120)] * 2)
    assert count(drawn[0][0], (255, 0, 0)) == 2 * 180 * 360
