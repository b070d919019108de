"""Speed of enlarging: seconds per megapixel of output, by steps and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from arbscale.coords import scaled_size
from arbscale.model import ArbitraryScaleModel
from arbscale.unet import pick_precision

STEPS = (1, 2, 3, 5)
SIDE, SCALE = 128, 2.0  # of the image that is enlarged; what it holds changes no time
YARDSTICK = {"steps": 5, "precision": "float32"}  # in tiles of twice the training's size


def enlarging(
    model: ArbitraryScaleModel, seconds: Callable[[Callable[[], object]], float]
) -> list[dict]:
    """Time `model.upscale`; `seconds(call)` says how long a call takes. Rows that JSON can hold.

    The first row is the yardstick of the others: small tiles, which are computed again where they
    overlap, and five steps. bfloat16 has rows where the device is made for it.
    """
    precisions = ["float32"]
    if pick_precision("auto", model.device) != torch.float32:
        precisions.append("auto")
    low = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    megapixels = scaled_size((SIDE, SIDE), SCALE)[0] ** 2 / 1e6

    def rows() -> Iterator[tuple[str, dict]]:
        small = 2 * model.preset.low_size
        yield f"small tiles ({small} px)", {**YARDSTICK, "tile": small}
        for precision in precisions:
            for steps in STEPS:
                yield "", {"steps": steps, "precision": precision}

    found = []
    for name, options in rows():
        took = seconds(lambda options=options: model.upscale(low, SCALE, **options)) / megapixels
        shown = {"auto": "bfloat16"}.get(options["precision"], options["precision"])
        task = f"enlarging x{SCALE:g}, {options['steps']} steps, {shown}"
        found.append({"task": ", ".join(filter(None, [task, name])), "seconds_per_megapixel": took})
    return found
