"""Figures for the notebooks.

Every function takes tensors (3, H, W) in [-1, 1] and shows a PNG on white, with an alternative text
made of its labels. Images keep their pixels: a small one is enlarged by a whole factor,
and only one that is wider than its place is reduced.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from arbscale.coords import Window, check_window
from arbscale.store import InputError

Images = Tensor | Sequence[Tensor]

INK, PAPER, ACCENT, PALE = "#2b2d42", "#ffffff", "#e4572e", "#eef1f6"
PAGE, LEAST, GAP = 860, 160, 8  # pixels: a notebook's width, the least side of an image, between


def _pictures(images: Images) -> list[Any]:
    """Return one image, a batch or a list of images as PIL images; ValueError if there is none."""
    from arbscale.data import to_pil

    one = isinstance(images, Tensor) and images.ndim == 3
    pictures = [to_pil(image) for image in ([images] if one else images)]
    if not pictures:
        raise InputError("there is no image to show; pass at least one tensor (3, H, W)")
    return pictures


def _labels(labels: Sequence[Any] | None, n: int) -> list[str]:
    """Return n labels, empty for None; ValueError for another number of them."""
    labels = [""] * n if labels is None else [str(label) for label in labels]
    if len(labels) != n:
        raise InputError(f"{n} images need {n} titles, got {len(labels)}")
    return labels


def _resized(picture: Any, size: tuple[int, int], box: Any = None) -> Any:
    """Resize an image, or a part of it, with hard pixels of equal size up, antialiasing down."""
    from PIL.Image import Resampling

    box = box or (0, 0, *picture.size)
    sides = box[2] - box[0], box[3] - box[1]
    if size[0] < sides[0] or size[1] < sides[1]:
        return picture.resize(size, Resampling.LANCZOS, box=box)
    whole = [math.ceil(n / side) * math.ceil(side) for n, side in zip(size, sides, strict=True)]
    return picture.resize(whole, Resampling.NEAREST, box=box).resize(size, Resampling.BOX)


def _fitted(picture: Any, box: float) -> Any:
    """Scale an image so that its longer side is `box` pixels."""
    factor = box / max(picture.size)
    return _resized(picture, tuple(max(1, round(factor * n)) for n in picture.size))


def show(images: Images, titles: Sequence[Any] | None = None, columns: int | None = None) -> None:
    """Show images in rows of `columns` (as many as fit), each at its own pixels, titles above.

    `images` is one image (3, H, W), a batch (B, 3, H, W) or a list. One whose shorter side is under
    160 px is enlarged by a whole factor.
    """
    pictures = _pictures(images)
    titles = _labels(titles, n := len(pictures))
    sides = [(picture.width, -(-LEAST // min(picture.size))) for picture in pictures]
    if columns is None:
        rows = -(-n // max(1, PAGE // (max(side * factor for side, factor in sides) + GAP)))
        columns = -(-n // rows)
    room = PAGE // columns - GAP
    boxes = [min(side * min(factor, room // side or 1), room) for side, factor in sides]
    pairs = zip(pictures, boxes, strict=True)
    shown = [_resized(p, (box, max(1, round(p.height * box / p.width)))) for p, box in pairs]
    _display(_sheet(shown, titles, [""] * n, columns), _describe(pictures, titles))


def show_scales(images: Images, titles: Sequence[Any] | None = None) -> None:
    """Show images of different sizes in one row of equal boxes, with the size under each.

    All fill their box, so that resolution alone differs.
    """
    pictures = _pictures(images)
    titles = _labels(titles, n := len(pictures))
    sizes = ["{1} × {0}".format(*picture.size) for picture in pictures]
    shown = [_fitted(picture, min(PAGE // n - GAP, 300)) for picture in pictures]
    _display(_sheet(shown, titles, sizes, n), _describe(pictures, titles))


def zoom_strip(images: Images, window: Window, titles: Sequence[Any] | None = None) -> None:
    """Show the first image with a box in it, then what each image has inside that box.

    `window` is (top, left, height, width) in pixels of the first image. The others may have other
    sizes: they show the same part of the scene. Titles stand above the enlarged parts.
    """
    from PIL import ImageDraw

    pictures = _pictures(images)
    titles = _labels(titles, len(pictures))
    across, height = pictures[0].size
    top, left, tall, wide = check_window(window, (height, across))
    panels = len(pictures) + 1
    side = min(PAGE // panels - GAP, 256)
    side = side // max(tall, wide) * max(tall, wide) or side  # a whole factor where it grows
    shown = [_fitted(pictures[0], side)]
    scale = shown[0].width / across
    edge = [scale * n for n in (left, top, left + wide, top + tall)]
    for colour, width in ((PAPER, 4), (ACCENT, 2)):  # seen on any background
        ImageDraw.Draw(shown[0]).rectangle(edge, outline=colour, width=width)
    size = tuple(max(1, round(side * n / max(tall, wide))) for n in (wide, tall))
    for picture in pictures:
        x, y = picture.width / across, picture.height / height
        part = (x * left, y * top, x * (left + wide), y * (top + tall))
        shown.append(_resized(picture, size, part))
    sheet = _sheet(shown, ["", *titles], [""] * panels, panels)
    names = ", from " * any(titles) + ", ".join(filter(None, titles))
    _display(sheet, f"an image of {height} × {across} and its part{names}")


def contact_sheet(
    items: Sequence[tuple[Tensor, str]], columns: int | None = None, box: int = 256
) -> Any:
    """Return one PIL image with every (image, label) in a box of `box` pixels, label below.

    An image that is smaller than its box is enlarged with hard pixels, a larger one is reduced
    with antialiasing; its aspect ratio is kept. A label has at most three lines.
    """
    from PIL import Image

    shown, labels = [], []
    for tensor, label in items:
        picture = _fitted(_pictures(tensor)[0], box)
        shown.append(Image.new("RGB", (box, box), PAPER))
        shown[-1].paste(picture, ((box - picture.width) // 2, (box - picture.height) // 2))
        labels.append(str(label))
    if not shown:
        raise InputError("there is no image to show; pass at least one (tensor, label)")
    columns = max(1, min(len(shown), columns or 6))
    return _sheet(shown, [""] * len(shown), labels, columns)


def _sheet(shown: list[Any], above: list[str], below: list[str], columns: int) -> Any:
    """Put PIL images into rows on white, with text above and below each."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # it has Greek and ×
    font, line = ImageFont.truetype(path, 13), 18
    step = max(picture.width for picture in shown) + GAP
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrap(texts: list[str]) -> tuple[list[list[str]], int]:
        lines = [_wrap(text, lambda t: measure.textlength(t, font=font) < step) for text in texts]
        return lines, line * max(map(len, lines))

    (above, head), (below, foot) = wrap(above), wrap(below)
    tall = max(picture.height for picture in shown)
    down = head + tall + foot + GAP
    sheet = Image.new("RGB", (step * columns + GAP, down * -(-len(shown) // columns)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(shown):
        x, y = GAP + i % columns * step, i // columns * down + GAP // 2
        sheet.paste(picture, (x + (step - GAP - picture.width) // 2, y + head))
        for lines, at in ((above[i], head - line * len(above[i])), (below[i], head + tall)):
            for k, text in enumerate(lines):
                place = (x + (step - GAP) / 2, y + at + line * (k + 0.5))
                draw.text(place, text, INK, font=font, anchor="mm")
    return sheet


def _wrap(text: str, fits: Any) -> list[str]:
    """Break a text into lines that fit, at most three; a word that is too long is cut."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            if lines[-1] and not fits(f"{lines[-1]} {word}"):
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
    for k, line in enumerate(lines):
        while line and not fits(lines[k]):
            line = line[:-1]
            lines[k] = line + "…"
    return lines[:3]


def show_plot(text: str = "") -> None:
    """Show the current matplotlib figure and close it; without `text`, its labels describe it."""
    import matplotlib.pyplot as plt
    from PIL import Image, ImageChops, ImageStat

    figure, file = plt.gcf(), io.BytesIO()
    for axis in () if text else figure.axes:
        legend = axis.get_legend()
        names = [name.get_text() for name in legend.get_texts()] if legend else []
        labels = (axis.get_title(), axis.get_ylabel(), axis.get_xlabel(), *names)
        words = (" ".join(re.sub(r"[$\\{}]", " ", x).split()) for x in labels if x)
        text += "; " * bool(text) + ", ".join(words)
    figure.savefig(file, dpi=200, facecolor=PAPER, bbox_inches="tight")
    image = Image.open(file).convert("RGB")
    plt.close(figure)
    small = image.quantize(256, kmeans=1)  # a third of the bytes
    if max(ImageStat.Stat(ImageChops.difference(image, small.convert("RGB"))).rms) < 1:
        image = small  # of 255 levels: nothing to be seen
    _display(image, f"plot: {text}", image.width // 2)  # sharp where a screen has small pixels


def _describe(pictures: list[Any], titles: list[str]) -> str:
    sizes = dict.fromkeys("{1} × {0}".format(*picture.size) for picture in pictures)
    names = ", ".join(filter(None, titles))
    what = f"{len(pictures)} image{'s' * (len(pictures) > 1)}, {', '.join(sizes)}"
    return f"{what}: {names}" if names else what


def _display(image: Any, text: str, width: int | None = None) -> None:
    """Show a PIL image, `width` CSS pixels wide if given; `text` is its alternative text."""
    from IPython.display import display

    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": text}
    facts = {"alt": text} | ({"width": width} if width else {})
    display(data, metadata={"image/png": facts}, raw=True)


PARTS = {
    "encoder": ("encoder E\ndown by f", "stage 1, then frozen", 2.9),
    "denoiser": (
        "denoiser: U-Net\nwith transformer",
        "stage 3; stage 4 with\na loss on the image",
        3.15,
    ),
    "decoder": ("symmetric decoder\nsame resolution", "stage 2, then frozen", 8.0),
    "liif": ("LIIF: one MLP,\ncalled per pixel", "stage 2, then frozen", 12.9),
}
"""The networks of the method: what each is, when it is trained, and where `pipeline` draws it."""


def pipeline(*highlight: str) -> None:
    """Draw the whole method with its shapes and stages; the named `PARTS` stand out."""
    import matplotlib.pyplot as plt

    if unknown := set(highlight) - set(PARTS):
        raise InputError(f"unknown part {unknown.pop()!r}; take some of {', '.join(PARTS)}")
    axis = plt.figure(figsize=(8.4, 2.8)).add_axes((0, 0, 1, 1), xlim=(0, 17.2), ylim=(0, 5.6))
    axis.axis("off")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, "fontsize": 9, **style}
        axis.text(x, y, text, **style)

    def arrow(start: tuple, end: tuple, **style: Any) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, **style})

    for name, (text, stage, x) in PARTS.items():
        y = 1.6 if name == "denoiser" else 4.4
        fill, ink = (ACCENT, PAPER) if name in highlight else (PALE, INK)
        box = {"boxstyle": "round,pad=0.4", "facecolor": fill, "edgecolor": INK}
        write(x, y, text, color=ink, bbox=box)
        write(x, y - 0.9, stage, va="top", style="italic")
    for x, y, text in (
        (0.65, 4.4, "image x\n3 × H × W"),
        (0.65, 1.6, "noise\nc × h × w"),
        (5.3, 4.4, "latent z\nc × h × w"),
        (10.6, 4.4, "features\nC × h × w"),
        (15.9, 4.4, "image of any size\n3 × H' × W'"),
        (
            10.9,
            1.5,
            "super-resolution: the denoiser also gets\nthe small image, enlarged and encoded",
        ),
    ):
        write(x, y, text)
    for x in (1.4, 4.1, 6.0, 9.5, 11.3, 14.1):
        arrow((x, 4.4), (x + 0.4, 4.4))
    arrow((1.4, 1.6), (1.8, 1.6))
    arrow((4.6, 1.6), (5.3, 3.9), connectionstyle="angle,angleA=0,angleB=90,rad=6")
    write(5.5, 2.6, "steps", ha="left")
    names = " and ".join(PARTS[name][0].replace("\n", " ") for name in highlight) or "none"
    show_plot(f"the pipeline from image or noise to an image of any size; highlighted: {names}")
