"""What an explorer explores: a source, what it is compared with, and the Python that makes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from arbscale.autoencoder import FirstStage
from arbscale.coords import Size, Window, check_size, same_area, scaled_size
from arbscale.model import ArbitraryScaleModel, Progress
from arbscale.samplers import Callback
from arbscale.widgets.recipe import Settings, enlarger_code, features_code, generator_code
from arbscale.widgets.sources import (
    OwnOutput,
    Painted,
    Photo,
    Resized,
    Source,
    as_source,
    enlarge,
    mixed_latent,
)

KEPT_LATENTS = 32
Rivals = dict[str, tuple[str, Source]]
"""What stands on the right: label and source by key."""


@dataclass(frozen=True)
class Subject:
    """A source with its rivals; `code(size, window)` is the Python that renders a window of it."""

    source: Source
    rivals: Rivals
    code: Callable[[Size, Window], str]
    note: str = ""
    number: int = 0  # counts what one explorer has shown

    def rival(self, key: Any) -> str:
        """Return the key if there is such a rival, else the first one's."""
        return key if key in self.rivals else next(iter(self.rivals))


def given(
    model: ArbitraryScaleModel | FirstStage, features: Tensor, size: Any, extra: Rivals
) -> Subject:
    """Explore features (1, C, h, w) as they are; `size` is what scale 1 stands for."""
    stage = getattr(model, "first_stage", model)
    base = check_size(size or scaled_size(features.shape[-2:], stage.factor))
    source = Painted(stage, features.detach(), base)
    return Subject(source, own(source, base) | extra, features_code)


class Generator:
    """Images drawn by a model, and by another one from the same seeds."""

    def __init__(
        self, model: ArbitraryScaleModel, other: ArbitraryScaleModel | None, extra: Rivals
    ):
        self.model, self.other, self.extra = model, other, extra
        self._latents: OrderedDict[Any, Tensor] = OrderedDict()

    def subject(self, settings: Settings, callback: Callback | None = None) -> Subject:
        """Draw; `callback(i, z_t, z_0)` after each step of the first model, latents scaled."""
        source = self._painted(self.model, settings, callback)
        rivals = own(source, source.base) | self.extra
        if self.other is not None:
            label = f"{self.other.preset.name}, the other model"
            rivals["other"] = label, self._painted(self.other, settings, callback)
        return Subject(source, rivals, partial(generator_code, self.model, settings))

    def base(self, settings: Settings) -> Size:
        """Return what scale 1 stands for: the training's area, in the ratio that is drawn."""
        return same_area(self.model.preset.image_size, settings.size)

    def _painted(
        self, model: ArbitraryScaleModel, settings: Settings, callback: Callback | None
    ) -> Painted:
        grid = model.latent_grid(settings.size)
        key = id(model), replace(settings, size=grid)
        if key not in self._latents:
            seeds = settings.seed, settings.to_seed
            how = settings.share, settings.steps, settings.sampler
            self._latents[key] = mixed_latent(model, seeds, *how, grid, callback)
            while len(self._latents) > KEPT_LATENTS:
                self._latents.popitem(last=False)
        return Painted.of(model.first_stage, self._latents[key], self.base(settings))


def larger(
    model: ArbitraryScaleModel,
    other: ArbitraryScaleModel | None,
    photo: Photo,
    settings: Settings,
    progress: Progress = lambda done, total: None,
) -> Subject:
    """Enlarge a photograph by one or two models; `progress` after each step of each tile."""
    source = enlarge(model, photo.low, settings.sampling, progress)
    trained = model.preset.image_size / model.preset.low_size
    rivals: Rivals = {
        "bicubic": ("the input, bicubic", Resized(photo.low)),
        "nearest": ("the input, nearest", Resized(photo.low, nearest=True)),
        "own": own(source, scaled_size(source.base, trained))["bicubic"],
    }
    if photo.truth is not None:
        rivals["truth"] = "ground truth", Resized(photo.truth)
    if other is not None:
        again = enlarge(other, photo.low, settings.sampling, progress)
        rivals["other"] = f"{other.preset.name}, the other model", again
    code = partial(enlarger_code, model, settings, photo)
    return Subject(source, rivals | photo.extra, code, photo.note)


def own(source: Source, size: Size) -> Rivals:
    """Return the rivals that are resized from the source's own output at one size."""
    title = f"its own {size[0]} x {size[1]} output"
    return {
        "bicubic": (f"{title}, bicubic", OwnOutput(source, size)),
        "nearest": (f"{title}, nearest", OwnOutput(source, size, nearest=True)),
    }


def extra_rivals(truth: Any, other: Any) -> Rivals:
    """Return the rivals that are given as images or functions."""
    extra: Rivals = {}
    if truth is not None:
        extra["truth"] = "ground truth", as_source(truth)
    if other is not None and not isinstance(other, ArbitraryScaleModel):
        extra["other"] = "the other image", as_source(other)
    return extra


def opened(image: Any, limit: int, extra: Rivals) -> Photo:
    """Take a photograph as a path, or as anything that `to_tensor` takes."""
    from arbscale.data import load_image, to_tensor

    if isinstance(image, (str, Path)):
        photo = Photo.reduced(load_image(image), Path(image).name, limit)
    else:
        photo = Photo.reduced(to_tensor(image).cpu(), "photo.png", limit)
    return replace(photo, extra=extra)
