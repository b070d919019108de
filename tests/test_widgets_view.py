"""What a viewer sees, and what is rendered for it."""

import math

import pytest

from arbscale.widgets.view import MAX_SCREEN, MAX_ZOOM, View, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.7", (237, 355)),
        ("x2", (128, 192)),
        ("2x", (128, 192)),
        (" 0,5 ", (32, 48)),
        ("180x240", (180, 240)),
        ("180 × 240", (180, 240)),
        (".25", (16, 24)),
    ],
)
def test_a_scale_or_a_size_is_read(text, size):
    assert parse_size(text, (64, 96)) == size


@pytest.mark.parametrize("text", ["", "x", ".", "many", "-2", "0", "0x5", "1e9", "nan", "3x4x5"])
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError):
        parse_size(text, (64, 64))


@pytest.mark.parametrize("text", ["9999", "100000x2"])
def test_an_endless_size_is_refused(text):
    with pytest.raises(ValueError, match="32,768"):
        parse_size(text, (64, 64))


@pytest.mark.parametrize("size", [(1, 1), (33, 71), (420, 420), (8192, 8192), (4096, 16)])
@pytest.mark.parametrize("zoom", [1, 1.7, 40, 4000])
def test_a_window_lies_in_its_image_and_covers_what_is_seen(size, zoom):
    view = View.read({"centre": [0.9, 0.2], "zoom": zoom, "screen": [420, 300]})
    for shown, window in [(size, view.window(size)), view.rendered(size)]:
        for first, length, n, middle in zip(
            window[:2], window[2:], shown, view.centre, strict=True
        ):
            assert 0 <= first < first + length <= n
            assert first <= (middle - 0.5 / view.zoom) * n + 1e-3
            assert first + length >= (middle + 0.5 / view.zoom) * n - 1e-3


@pytest.mark.parametrize("scale", [1, 7, 64, 500])
def test_the_cost_follows_the_screen(scale):
    view = View(screen=(420, 420))
    shown, window = view.rendered((64 * scale, 64 * scale))
    assert shown == ((64 * scale,) * 2 if 64 * scale <= 420 else (420, 420))
    assert window == (0, 0, *shown)


def test_near_pixels_are_the_outputs_own():
    view = View(zoom=64.0, screen=(420, 420))
    shown, window = view.rendered((8192, 8192))
    assert shown == (8192, 8192)
    assert window[2:] == (128, 128)


def test_a_budget_of_pixels_is_kept():
    view = View(zoom=1.3, screen=(420, 420))
    for size in (64, 420, 8192):
        _, window = view.rendered((size, size), budget=10_000)
        assert window[2] * window[3] < 11_000
    assert view.rendered((8, 8), budget=10_000)[0] == (8, 8)


@pytest.mark.parametrize(
    "question",
    [
        {"zoom": math.nan, "centre": [None, "x"], "screen": [0, 1e12]},
        {"zoom": 1e12, "centre": [-5, 7], "screen": [-1, math.inf]},
    ],
)
def test_what_a_browser_sends_is_brought_into_range(question):
    view = View.read(question)
    assert 1 <= view.zoom <= MAX_ZOOM
    assert all(0 <= x <= 1 for x in view.centre)
    assert all(16 <= n <= MAX_SCREEN for n in view.screen)
