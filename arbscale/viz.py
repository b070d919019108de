"""Figures for the notebooks.

Every function takes tensors (3, H, W) in [-1, 1]. Pixels stay visible: nothing is smoothed when it
is enlarged. What is drawn with matplotlib is shown at once and returns None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from arbscale.coords import Window, check_window
from arbscale.store import InputError

Images = Tensor | Sequence[Tensor]

INK, PAPER, ACCENT = "#2b2d42", "#ffffff", "#e4572e"
DPI = 100
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "figure.facecolor": PAPER,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


def _arrays(images: Images) -> list[np.ndarray]:
    """Return one image, a batch or a list of images as arrays (H, W, 3) of uint8."""
    from arbscale.data import to_pil

    if isinstance(images, Tensor) and images.ndim == 3:
        images = [images]
    arrays = [np.asarray(to_pil(image)) for image in images]
    if not arrays:
        raise InputError("there is no image to show; pass at least one tensor (3, H, W)")
    return arrays


def _labels(labels: Sequence[str] | None, n: int) -> list[str]:
    """Return n labels, empty for None; ValueError for another number of them."""
    labels = [""] * n if labels is None else [str(label) for label in labels]
    if len(labels) != n:
        raise InputError(f"{n} images need {n} titles, got {len(labels)}")
    return labels


def _panels(n: int, columns: int, width: float, ratio: float, margin: float) -> tuple[Any, list]:
    """Return a figure `width` inches wide and n frameless axes whose height is ratio * width."""
    import matplotlib.pyplot as plt

    rows = -(-n // columns)
    box = width / columns
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(width, rows * (box * ratio + margin)),
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis in grid.flat[n:]:
        axis.set_visible(False)
    return figure, list(grid.flat[:n])


def _draw(axis: Any, array: np.ndarray, box_inches: float, title: str = "", **options: Any) -> None:
    """Draw an image with hard pixels, or antialiased if the box has fewer pixels than it."""
    enlarged = max(array.shape[:2]) <= box_inches * DPI
    axis.imshow(array, interpolation="nearest" if enlarged else "antialiased", **options)
    if title:
        axis.set_title(title, pad=4)


def _show(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.show()
    plt.close(figure)


def show(
    images: Images,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    width: float = 9.0,
) -> None:
    """Show images side by side, `columns` a row (at most 8 unless told), `width` inches in all.

    `images` is one image (3, H, W), a batch (B, 3, H, W) or a list; titles stand above.
    """
    arrays = _arrays(images)
    columns = min(len(arrays), 8) if columns is None else max(1, columns)
    _show_panels(arrays, titles, columns, width, sizes=False)


def show_scales(images: Images, titles: Sequence[str] | None = None, width: float = 9.0) -> None:
    """Show images of different sizes in boxes of one width, with the size under each.

    All fill their box, so that resolution alone differs.
    """
    arrays = _arrays(images)
    _show_panels(arrays, titles, len(arrays), width, sizes=True)


def _show_panels(
    arrays: list[np.ndarray],
    titles: Sequence[str] | None,
    columns: int,
    width: float,
    sizes: bool,
) -> None:
    """Show images in rows of `columns`, titles above, and their sizes below where asked."""
    import matplotlib.pyplot as plt

    titles = _labels(titles, len(arrays))
    width = min(width, 4.5 * columns)
    ratio = max(array.shape[0] / array.shape[1] for array in arrays)
    margin = 0.25 * sizes + 0.25 * any(titles)
    with plt.rc_context(_STYLE):
        figure, axes = _panels(len(arrays), columns, width, ratio, margin)
        for axis, array, title in zip(axes, arrays, titles, strict=True):
            _draw(axis, array, width / columns, title)
            if sizes:
                axis.set_xlabel("{} × {}".format(*array.shape[:2]), labelpad=4)
        _show(figure)


def zoom_strip(
    images: Images, window: Window, titles: Sequence[str] | None = None, width: float = 9.0
) -> None:
    """Show the first image with a box in it, then what each image has inside that box.

    `window` is (top, left, height, width) in pixels of the first image. The others may have other
    sizes: they show the same part of the scene. Titles stand above the enlarged parts.
    """
    import matplotlib.pyplot as plt

    arrays = _arrays(images)
    titles = _labels(titles, len(arrays))
    height, across = arrays[0].shape[:2]
    top, left, tall, wide = check_window(window, (height, across))
    panels = len(arrays) + 1
    width = min(width, 4.5 * panels)
    extent = (0, across, height, 0)  # every image covers the first one's pixels
    with plt.rc_context(_STYLE):
        figure, axes = _panels(
            panels, panels, width, max(height / across, tall / wide), 0.25 * any(titles)
        )
        _draw(axes[0], arrays[0], width / panels, extent=extent)
        axes[0].add_patch(
            plt.Rectangle((left, top), wide, tall, fill=False, color=ACCENT, linewidth=1.5)
        )
        for axis, array, title in zip(axes[1:], arrays, titles, strict=True):
            share = max(tall / height, wide / across)
            _draw(axis, array, width / panels / share, title, extent=extent)
            axis.set(xlim=(left, left + wide), ylim=(top + tall, top))
            axis.spines[:].set(visible=True, color=ACCENT, linewidth=1.5)
        _show(figure)


def contact_sheet(
    items: Sequence[tuple[Tensor, str]], columns: int | None = None, box: int = 256
) -> Any:
    """Return one PIL image with every (image, label) in a box of `box` pixels, label below.

    An image that is smaller than its box is enlarged with hard pixels, a larger one is reduced
    with antialiasing; its aspect ratio is kept. A label that is too long is cut.
    """
    from PIL import Image, ImageDraw, ImageFont

    from arbscale.data import to_pil

    if not items:
        raise InputError("there is no image to show; pass at least one (tensor, label)")
    columns = max(1, min(len(items), columns or 6))
    rows = -(-len(items) // columns)
    gap, line = max(4, box // 24), 24
    step_x, step_y = box + gap, box + line + gap
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)  # it has no "×"
    for i, (tensor, label) in enumerate(items):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        image = to_pil(tensor)
        factor = box / max(image.size)
        size = tuple(max(1, round(factor * n)) for n in image.size)
        way = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        image = image.resize(size, way)
        sheet.paste(image, (left + (box - size[0]) // 2, top + (box - size[1]) // 2))
        label = _cut(
            str(label).replace("×", "x"), lambda text: draw.textlength(text, font=font) <= box
        )
        draw.text((left + box / 2, top + box + line / 2), label, INK, font=font, anchor="mm")
    return sheet


def _cut(text: str, fits: Any) -> str:
    """Return the text's first line, ending in an ellipsis where it does not fit."""
    text = (text.splitlines() or [""])[0]
    if fits(text):
        return text
    while text and not fits(text + "…"):
        text = text[:-1]
    return text + "…"
