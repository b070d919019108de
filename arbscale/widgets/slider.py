"""A plain slider for notebooks: each move renders, from features computed before."""

from __future__ import annotations

import io
import time
from typing import Any

import torch
from torch import Tensor

from arbscale.autoencoder import FirstStage
from arbscale.coords import Size, Window, check_size, scaled_size

BOX = 352  # side of the displayed box on the screen; resolution changes inside it


@torch.no_grad()
def png(
    first_stage: FirstStage, features: Tensor, size: int | Size, window: Window | None = None
) -> bytes:
    """Render features (1, C, h, w) at `size`, or a window of that image, as a PNG file."""
    from arbscale.data import to_pil

    rgb = first_stage.render(features, size, window)[0].clamp(-1, 1)
    buffer = io.BytesIO()
    to_pil(rgb.cpu()).save(buffer, "png")
    return buffer.getvalue()


def scale_slider(
    first_stage: FirstStage,
    features: Tensor,
    base_size: int | Size,
    scale: float = 3.7,
    max_scale: float = 8.0,
) -> Any:
    """Build a slider of the output's scale beside two views: the whole image, and its middle.

    Parameters
    ----------
    first_stage
        Renders.
    features
        (1, C, h, w), computed once by `first_stage.features`.
    base_size
        (height, width) or side that scale 1 stands for.
    scale, max_scale
        Where the slider starts and ends; it begins at 0.5.

    Returns
    -------
    ipywidgets.VBox
        The last line of a cell shows it. Status and errors appear in its line of text.

    """
    import ipywidgets

    base_size = check_size(base_size)
    ratio = base_size[0] / base_size[1]
    box = {"width": f"{BOX}px", "height": f"{round(BOX * ratio)}px", "object_fit": "fill"}
    layout = ipywidgets.Layout(**box)
    whole, middle = (ipywidgets.Image(format="png", layout=layout) for _ in range(2))
    slider = ipywidgets.FloatSlider(
        scale, min=0.5, max=max_scale, step=0.1, description="scale", continuous_update=False
    )
    status = ipywidgets.Label()
    style = ipywidgets.HTML("<style>.arbscale-pixels { image-rendering: pixelated; }</style>")

    def move(_: Any = None) -> None:
        try:
            size = scaled_size(base_size, slider.value)
            window = (size[0] * 3 // 8, size[1] * 3 // 8, -(-size[0] // 4), -(-size[1] // 4))
            started = time.perf_counter()
            whole.value = png(first_stage, features, size)
            seconds = time.perf_counter() - started
            middle.value = png(first_stage, features, size, window)
            status.value = (
                f"{size[0]} x {size[1]} px in {1000 * seconds:.0f} ms from {features[0].numel():,} "
                f"feature values; right: the middle sixteenth"
            )
        except Exception as error:  # a callback's exception would be lost
            status.value = f"error: {error}"

    whole.add_class("arbscale-whole").add_class("arbscale-pixels")
    middle.add_class("arbscale-middle").add_class("arbscale-pixels")
    slider.add_class("arbscale-scale")
    status.add_class("arbscale-status")
    slider.observe(move, names="value")
    move()
    views = ipywidgets.HBox([whole, middle])
    return ipywidgets.VBox([style, slider, views, status]).add_class("arbscale-slider")
