"""What a viewer sees: sizes as they are typed, the visible window, and how densely to render it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from arbscale.coords import Size, Window, check_size, scaled_size
from arbscale.store import InputError

MAX_SIDE = 32_768  # of an output: float32 coordinates tell its pixels apart
MAX_SCREEN = 1_024  # pixels a side rendered for one view, whatever a browser asks for
MAX_ZOOM = 4_096.0


def parse_size(text: str, base: Size) -> Size:
    """Read a scale ("3.7", "x3.7") or a size, height first ("180x240"), as an output size.

    `base` is what scale 1 stands for. Raises ValueError for anything else, or over `MAX_SIDE`.
    """
    text = text.strip().lower().replace("×", "x").replace(",", ".")
    if pair := re.fullmatch(r"(\d{1,9})\s*x\s*(\d{1,9})", text):
        return bounded(check_size((int(pair[1]), int(pair[2]))))
    if factor := re.fullmatch(r"x?\s*(\d{0,9}\.?\d{0,9})\s*x?", text):
        if factor[1].strip(".") and float(factor[1]) > 0:
            return bounded(scaled_size(base, float(factor[1])))
    raise InputError(f"type a scale such as 3.7 or a size such as 180x240, not {text[:40]!r}")


def bounded(size: Size) -> Size:
    """Return `size`; ValueError if a side is over `MAX_SIDE`."""
    if max(size) > MAX_SIDE:
        raise InputError(f"{size[0]} x {size[1]} has a side over {MAX_SIDE:,} px; take less")
    return size


@dataclass(frozen=True)
class View:
    """What is seen of an image: where its middle is, how far it is enlarged, on which screen."""

    centre: tuple[float, float] = (0.5, 0.5)  # (y, x), in units of the image
    zoom: float = 1.0  # 1 shows the whole image
    screen: Size = (420, 420)  # (height, width) in device pixels

    @classmethod
    def read(cls, question: dict) -> View:
        """Take a view from a browser's message, with every number brought into its range."""
        zoom = _within(question.get("zoom"), 1.0, MAX_ZOOM, 1.0)
        half = 0.5 / zoom
        centre = [_within(x, half, 1 - half, 0.5) for x in question.get("centre", (0.5, 0.5))]
        screen = [
            round(_within(n, 16, MAX_SCREEN, 420)) for n in question.get("screen", (420, 420))
        ]
        return cls((centre[0], centre[1]), zoom, (screen[0], screen[1]))

    def window(self, size: Size) -> Window:
        """Return the pixels of an image of `size` that are seen, in part or in whole."""
        spans = []
        for middle, n in zip(self.centre, size, strict=True):
            first = math.floor((middle - 0.5 / self.zoom) * n + 1e-6)
            last = math.ceil((middle + 0.5 / self.zoom) * n - 1e-6)
            first = min(max(first, 0), n - 1)
            spans.append((first, min(max(last, first + 1), n) - first))
        return spans[0][0], spans[1][0], spans[0][1], spans[1][1]

    def rendered(self, size: Size, budget: float = math.inf) -> tuple[Size, Window]:
        """Return at which size, and which window of it, an image of `size` is rendered.

        The size itself unless the screen, or a budget of pixels, has room for fewer: the decoder
        paints any size, so what the screen cannot show is not computed.
        """
        dense = [n / self.zoom / room for n, room in zip(size, self.screen, strict=True)]
        factor = 1 / max(1.0, *dense)
        pixels = size[0] * size[1] * (factor / self.zoom) ** 2
        factor *= min(1.0, math.sqrt(budget / pixels))
        shown = size if factor == 1 else scaled_size(size, factor)
        return shown, self.window(shown)


def _within(value: object, low: float, high: float, default: float) -> float:
    """Return a number from a browser inside [low, high]; `default` for what is no number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return default
    return min(max(float(value), low), high)
