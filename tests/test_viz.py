"""The notebooks' pictures: what is drawn, what is refused, and that nothing leaks."""

import pytest
import torch

from arbscale import viz

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch):
    """Collect the axes of every figure that is shown."""
    plt.switch_backend("Agg")
    figures = []

    def collect():
        figure = plt.gcf()
        figure.canvas.draw()
        figures.append([axis for axis in figure.axes if axis.get_visible()])

    monkeypatch.setattr(plt, "show", collect)
    yield figures
    assert not plt.get_fignums(), "a figure stayed open"


def picture(height=20, width=None, level=0.0):
    return torch.full((3, height, width or height), level)


def test_show_takes_one_a_batch_or_a_list(drawn):
    assert viz.show(picture()) is None
    viz.show(torch.zeros(12, 3, 8, 8), columns=5)
    viz.show([picture(9), picture(30, 50)], titles=["small", "large"])
    assert [len(axes) for axes in drawn] == [1, 12, 2]
    assert [axis.get_title() for axis in drawn[2]] == ["small", "large"]


def test_pixels_stay_hard_when_enlarged_and_no_longer_when_reduced(drawn):
    viz.show([picture(16), picture(1200)])
    ways = [axis.images[0].get_interpolation() for axis in drawn[0]]
    assert ways[0] == "nearest" and ways[1] != "nearest"


def test_values_are_drawn_unscaled(drawn):
    viz.show(picture(4, level=-0.5))  # matplotlib would stretch floats, or clip them
    assert (drawn[0][0].images[0].get_array() == 64).all()


def test_show_scales_writes_sizes_and_keeps_boxes_equal(drawn):
    viz.show_scales([picture(16), picture(37), picture(120)])
    axes = drawn[0]
    assert [axis.get_xlabel() for axis in axes] == ["16 × 16", "37 × 37", "120 × 120"]
    widths = [axis.get_window_extent().width for axis in axes]
    assert max(widths) - min(widths) < 1


def test_zoom_strip_shows_the_same_part_of_every_size(drawn):
    large = picture(100, 60, -1.0)
    large[:, 50:70, 30:45] = 1.0
    small = picture(50, 30, -1.0)
    small[:, 25:35, 15:23] = 1.0
    viz.zoom_strip([large, small], (50, 30, 20, 15), titles=["large", "small"])
    whole, *zooms = drawn[0]
    assert len(zooms) == 2 and len(whole.patches) == 1
    assert whole.patches[0].get_bbox().bounds == (30, 50, 15, 20)
    for zoom in zooms:
        assert zoom.get_xlim() == (30, 45) and zoom.get_ylim() == (70, 50)
        assert tuple(zoom.images[0].get_extent()) == (0, 60, 100, 0)


def test_what_cannot_be_shown_is_refused(drawn):
    with pytest.raises(ValueError, match="titles"):
        viz.show([picture(), picture()], titles=["one"])
    with pytest.raises(ValueError, match="at least one"):
        viz.show([])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        viz.show(torch.zeros(20, 20))
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
    assert 300 < wide < 340 and 300 < tall < 420
    assert viz.contact_sheet([(picture(8), "first\nsecond")], box=100).size[0] < 120
    with pytest.raises(ValueError, match="at least one"):
        viz.contact_sheet([])


def test_importing_needs_no_matplotlib():
    import subprocess
    import sys

    code = "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None; "
    code += "sys.modules['skimage'] = None; import arbscale.viz, arbscale.data"
    subprocess.run([sys.executable, "-c", code], check=True)
