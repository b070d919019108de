"""The slider renders, and only renders."""

import dataclasses
import io

import pytest
import torch
from PIL import Image

from arbscale import presets
from arbscale.widgets import png, scale_slider

ipywidgets = pytest.importorskip("ipywidgets")


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    preset = dataclasses.replace(presets.tiny(), hidden=(16,))
    return presets.build_first_stage(preset).eval()


@pytest.fixture(scope="module")
def features(stage):
    with torch.no_grad():
        return stage.features(torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def widget(stage, features):
    return scale_slider(stage, features, (8, 12), scale=2.0, max_scale=10)


def find(widget, name):
    """Return the child with a class name, as a browser would find it."""
    pending = [widget]
    while pending:
        one = pending.pop()
        if f"arbscale-{name}" in getattr(one, "_dom_classes", ()):
            return one
        pending += getattr(one, "children", ())
    raise AssertionError(f"nothing is called arbscale-{name}")


def size_of(content) -> tuple[int, int]:
    """Height and width of a PNG file."""
    image = Image.open(io.BytesIO(bytes(content)))
    assert image.format == "PNG"
    return image.height, image.width


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (40, 30)], ids=str)
def test_png_has_the_asked_size(stage, features, size):
    assert size_of(png(stage, features, size)) == size


def test_png_of_a_window_is_a_crop(stage, features):
    whole = Image.open(io.BytesIO(png(stage, features, 20)))
    crop = Image.open(io.BytesIO(png(stage, features, 20, (3, 5, 8, 6))))
    expected = whole.crop((5, 3, 11, 11))
    assert crop.size == (6, 8)
    pairs = zip(crop.tobytes(), expected.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


def test_the_picture_is_there_before_the_first_move(widget):
    assert size_of(find(widget, "whole").value) == (16, 24)
    assert size_of(find(widget, "middle").value) == (4, 6)
    assert "16 x 24 px in " in find(widget, "status").value


def test_a_move_renders_anew(widget):
    before = bytes(find(widget, "whole").value)
    find(widget, "scale").value = 3.7
    assert bytes(find(widget, "whole").value) != before
    assert size_of(find(widget, "whole").value) == (30, 44)
    assert size_of(find(widget, "middle").value) == (8, 11)
    assert "30 x 44 px in " in find(widget, "status").value
    assert " ms " in find(widget, "status").value


@pytest.mark.parametrize("scale", [0.5, 10])
def test_both_ends_of_the_slider(widget, scale):
    find(widget, "scale").value = scale
    size = round(8 * scale), round(12 * scale)
    assert size_of(find(widget, "whole").value) == size
    assert f"{size[0]} x {size[1]}" in find(widget, "status").value


def test_a_move_asks_neither_encoder_nor_decoder(stage, features):
    calls = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in (("encoder", stage.encoder), ("decoder", stage.decoder))
    ]
    slider = find(scale_slider(stage, features, 8), "scale")
    slider.value = 5.0
    for hook in hooks:
        hook.remove()
    assert not calls


def test_an_error_lands_in_the_status(widget, stage, monkeypatch):
    def fail(*_):
        raise MemoryError("no room for so many pixels")

    monkeypatch.setattr(type(stage), "render", fail)
    find(widget, "scale").value = 9.0
    assert find(widget, "status").value == "error: no room for so many pixels"
    monkeypatch.undo()
    find(widget, "scale").value = 4.0
    assert "32 x 48 px" in find(widget, "status").value


def test_the_box_on_the_screen_does_not_change(widget):
    layout = find(widget, "whole").layout
    before = layout.width, layout.height
    find(widget, "scale").value = 8.0
    assert (layout.width, layout.height) == before
    width, height = (int(side.removesuffix("px")) for side in before)
    assert width / height == pytest.approx(12 / 8, rel=0.01)


def test_a_slow_picture_is_not_drawn_at_each_pixel_of_the_mouse(widget):
    assert find(widget, "scale").continuous_update is False


def test_pixels_stay_pixels(widget):
    """A browser's own smoothing would hide what the method does."""
    html = "".join(c.value for c in widget.children if isinstance(c, ipywidgets.HTML))
    assert "image-rendering: pixelated" in html and "arbscale-pixels" in html
    assert "arbscale-pixels" in find(widget, "whole")._dom_classes


def test_a_wrong_size_is_refused_at_once(stage, features):
    with pytest.raises(ValueError, match="size"):
        scale_slider(stage, features, (0, 8))
