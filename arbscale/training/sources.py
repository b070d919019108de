"""The images of a training step, available at any size.

A batch is a function of the generator alone. Where several processes share a batch, each draws the
random numbers of all of it and reads its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Subset

from arbscale import store
from arbscale.coords import cell
from arbscale.data import Scenes, render_scenes, resize, sample_scenes, scene_colors, training_crop
from arbscale.data.folders import image_files, image_name
from arbscale.presets import Preset
from arbscale.store import InputError

SEEDS = 1 << 62  # of a crop


class Batch(Protocol):
    """Some images at any size; beyond `largest` there is no more detail."""

    largest: int | None  # a side in pixels; None where there is no limit

    def image(self, size: int) -> Tensor:
        """Return the images at `size`, (B, 3, size, size) in [-1, 1]."""

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Return the images' pixels at `size`, (B, N, 3), at pixel centres (B, N, 2)."""


class Source(Protocol):
    """Something that draws images.

    A plain function of `n` and `generator` will do as long as one process draws whole batches. Two
    attributes are optional. `identity`, a text that differs where the images do, lets latents be
    cached. `contents`, a dict for JSON, must stay the same when a run is resumed.
    """

    def __call__(self, n: int, generator: torch.Generator, part: slice | None = None) -> Batch:
        """Draw n images and return those of `part`, by default all."""


@dataclass(frozen=True)
class SceneBatch:
    """Continuous scenes: exact at every size."""

    scenes: Scenes
    largest = None

    def image(self, size: int) -> Tensor:
        """Render the scenes."""
        return render_scenes(self.scenes, size)

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Evaluate the scenes at the points alone."""
        return scene_colors(self.scenes, coords, cell((size, size)).expand(len(coords), 2))


@dataclass(frozen=True)
class PhotoBatch:
    """Crops of photographs (B, 3, s, s), resized with antialiasing."""

    crops: Tensor

    @property
    def largest(self) -> int:
        """Return s."""
        return self.crops.shape[-1]

    def image(self, size: int) -> Tensor:
        """Resize the crops by antialiased bicubic interpolation."""
        return resize(self.crops, size)

    def colors(self, size: int, coords: Tensor) -> Tensor:
        """Look the points up among the resized crops' pixels."""
        pixels = self.image(size).flatten(2).mT  # (B, size*size, 3)
        rows, cols = ((coords + 1) * (size / 2)).long().clamp(0, size - 1).unbind(-1)
        return pixels.gather(1, (rows * size + cols)[..., None].expand(-1, -1, 3))


@dataclass(frozen=True)
class SceneSource:
    """Draw runs of consecutive scenes from the first `count` of a seed's training split."""

    count: int
    seed: int

    def __call__(self, n: int, generator: torch.Generator, part: slice | None = None) -> SceneBatch:
        """Draw n scenes; see `Source`."""
        first = int(torch.randint(self.count - n + 1, (), generator=generator))
        wanted = range(n)[part or slice(None)]
        return SceneBatch(sample_scenes(len(wanted), self.seed, first + wanted.start))

    @property
    def identity(self) -> str:
        """Which scenes these are."""
        return f"scenes {self.seed}, {self.count}"

    @property
    def contents(self) -> dict[str, Any]:
        """The same."""
        return {"images": self.identity}


@dataclass(frozen=True)
class PhotoSource:
    """Draw random crops of photographs (3, H, W), flipped half of the time.

    The crop's side is drawn for the whole batch, uniform in `sides`. A share `flat` of the crops is
    reduced to the mean colour: photographs have few smooth areas, where errors show most.
    """

    images: Sequence[Tensor]
    sides: tuple[int, int]
    flat: float = 0.0

    def __call__(self, n: int, generator: torch.Generator, part: slice | None = None) -> PhotoBatch:
        """Draw n crops, each by a generator of its own: only those of `part` are read."""
        side = int(torch.randint(self.sides[0], self.sides[1] + 1, (), generator=generator))
        picks = torch.randint(len(self.images), (n,), generator=generator).tolist()
        seeds = torch.randint(SEEDS, (n,), generator=generator).tolist()
        wanted = range(n)[part or slice(None)]
        crops = torch.stack([training_crop(self._image(picks[i]), side, seeds[i]) for i in wanted])
        for crop, i in zip(crops, wanted, strict=True):
            if seeds[i] < self.flat * SEEDS:
                crop[:] = crop.mean(dim=(1, 2), keepdim=True)
        return PhotoBatch(crops)

    @cached_property
    def distinct(self) -> int | None:
        """How many images there are to draw, mirror images included; None where crops vary.

        The first image tells; ValueError where one that is drawn has another size.
        """
        whole = {*self.sides} == {*self.images[0].shape[-2:]} and self.sides[0] == self.sides[1]
        return 2 * len(self.images) if whole else None

    def pick(self, numbers: Sequence[int]) -> PhotoBatch:
        """Return images by number, below `distinct`: each image, then its mirror image."""
        images = [(self._image(n // 2), n % 2) for n in numbers]
        return PhotoBatch(torch.stack([x.flip(-1) if mirrored else x for x, mirrored in images]))

    def _image(self, index: int) -> Tensor:
        image, side = self.images[index], self.sides[0]
        if self.distinct and image.shape[-2:] != (side, side):
            found = "{} is {} x {}".format(image_name(self.images, index), *image.shape[-2:])
            raise InputError(f"{found}, not {side} x {side} as the first; crop it, or omit --whole")
        return image

    @cached_property
    def identity(self) -> str | None:
        """Which photographs and sides these are; None where only reading them all could tell."""
        whole = self.images.dataset if isinstance(self.images, Subset) else self.images
        images = [*self.images] if isinstance(whole, list | tuple) else image_files(self.images)
        drawn = f"{self.sides}, {self.flat} flat" if self.flat else f"{self.sides}"
        return images and f"photographs {store.content_key(images)}, crops {drawn}"

    @cached_property
    def contents(self) -> dict[str, Any]:
        """The files by name with their sizes, wherever their folder is, and the crops' sides."""
        images: Any = {name: size for name, size, _ in image_files(self.images) or ()}
        images = images or self.identity or f"{len(self.images)} images"
        return {"images": images, "sides": list(self.sides)}


def scene_source(count: int = 1 << 20, seed: int = 0) -> SceneSource:
    """Draw from the first `count` scenes of a seed's training split."""
    return SceneSource(count, seed)


def photo_source(images: Sequence[Tensor], preset: Preset) -> PhotoSource:
    """Draw random crops, their side uniform between the encoder's input and the largest target."""
    smallest = preset.image_size
    return PhotoSource(images, (smallest, max(smallest, preset.target_sizes[1])), preset.flat)


def whole_source(images: Sequence[Tensor]) -> PhotoSource:
    """Draw square images of one size whole, flipped half of the time; ValueError for others."""
    height, width = images[0].shape[-2:]
    if height != width:
        raise InputError(f"an image of {height} x {width} is not square; crop it, or omit --whole")
    return PhotoSource(images, (height, width))
