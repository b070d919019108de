"""Continuous scenes: small landscapes that are functions of real coordinates.

A scene has a colour at any point for any pixel extent, so an image of any size is ground truth that
was never resampled. Edges are antialiased by their signed distance over the pixel's footprint,
stripes by the Fourier transform of the pixel (a sinc), thin shapes by exact box overlap.

Geometry lives in the square [-1, 1]^2 of `coords.py`, (y, x) with y down. An image that is not
square still covers that square, so it shows the same scene stretched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from arbscale import coords as pixels
from arbscale.coords import Size, Window
from arbscale.store import InputError

MOODS = ("dawn", "day", "dusk", "night")
FIELDS = ("meadow", "wheat", "lavender", "tulips")
_SLOTS = 5  # the near hill has room for five things, trees or one house
_DRAWS = 64  # random numbers per scene
_NOWHERE = 9.0  # a height below every image
_POINTS = 1 << 18  # points evaluated at once by render_scenes

Cell = tuple[Tensor, Tensor]
"""The pixel's extent along y and along x, (n, 1) each."""


def _rgb(*codes: str) -> Tensor:
    """Return hexadecimal colours as a tensor (len(codes), 3) in [0, 1]."""
    return torch.tensor([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in codes])


# One row per mood.
_SKY_TOP = _rgb("5a96f0", "1f86ea", "43277a", "0a1142")
_SKY_LOW = _rgb("ffc2a6", "c9f0ff", "ff9448", "4060b4")
_SUN = _rgb("fff2c4", "fff3a0", "ffe27a", "f8f4d4")
_MOUNTAIN = _rgb("8d7ecb", "6796cc", "773a78", "27357a")
_SNOW = _rgb("ffe9ec", "ffffff", "ffb99a", "9fb2e6")
_HILL = _rgb("62b08e", "46a868", "63355f", "173c5c")
_WATER = _rgb("7fb4d8", "2f9fd8", "8a4a86", "16265e")
_LIGHT = torch.tensor([[1.0, 0.90, 0.88], [1.0, 1.0, 1.0], [0.92, 0.58, 0.56], [0.36, 0.44, 0.70]])
# One row per field: the crop, and the ground between its rows.
_CROP = _rgb("6cc24a", "f0c23c", "9a62e0", "f0525c")
_GROUND = _rgb("a4dc62", "cf9630", "6fae5e", "58a850")
# Conifers, round trees; the house.
_LEAVES = _rgb("1c6048", "ea8034")
_TRUNK, _WALL, _ROOF, _DOOR, _LAMP = _rgb("6a4630", "fff2de", "d8453c", "7a4a34", "ffd75e")[
    :, :, None
]


@dataclass(frozen=True)
class Scenes:
    """The parameters of n scenes: tensors whose first dimension is n. Colours are in [0, 1]."""

    mood: Tensor  # (n,) index into MOODS
    field: Tensor  # (n,) index into FIELDS
    sky: Tensor  # (n, 2, 3) colours at the top and at the horizon
    sun: Tensor  # (n, 3) y, x, radius; a crescent moon at night
    halo: Tensor  # (n,) strength of the rings around the sun
    base: Tensor  # (n, 3) height of the outlines: mountains, middle hill, near hill
    tilt: Tensor  # (n, 3) their slope
    waves: Tensor  # (n, 3, 2, 3) their two waves: amplitude, frequency, phase
    snow: Tensor  # (n,) height of the snow line
    lake: Tensor  # (n,) height of the shore, below the image where there is none
    rows: Tensor  # (n, 3) the field's rows: frequency, vanishing point y, x
    things: Tensor  # (n, 5, 3) x, height and presence of the tree in each fifth of the near hill
    round_trees: Tensor  # (n,) 1 for round crowns, 0 for conifers
    house: Tensor  # (n, 2) x and size, size 0 for no house

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.mood.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        """Return the scenes of a slice or an index tensor."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def _hash(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64 (C. Wellons' `lowbias32`)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _uniform(seed: int, indices: Tensor, draws: int) -> Tensor:
    """Return numbers (n, draws) in [0, 1), a function of seed, index and draw alone."""
    key = _hash(torch.tensor(seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    key = _hash(_hash(indices & 0xFFFFFFFF) ^ key)[:, None]  # (n, 1)
    return _hash(_hash(torch.arange(draws) + 1) ^ key).double().div(2**32).float()


def sample_scenes(n: int, seed: int = 0, first: int = 0) -> Scenes:
    """Return scenes `first` to `first + n - 1` of the endless sequence that `seed` names.

    Scene i of a seed is the same whatever `n` and `first`. Raises ValueError for a negative count.
    """
    if n < 0 or first < 0:
        raise InputError(f"n and first must be at least 0, got n={n}, first={first}")
    draws = iter(_uniform(seed, torch.arange(first, first + n), _DRAWS).unbind(1))

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(draws)

    def chance(p: float) -> Tensor:
        return (next(draws) < p).float()

    mood, field = (between(0, 4).long().clamp(max=3) for _ in range(2))
    warmth = between(-0.06, 0.06)[:, None] * torch.tensor([1.0, 0.2, -0.6])
    sky = torch.stack([_SKY_TOP[mood] - warmth, _SKY_LOW[mood] + warmth], 1).clamp(0, 1)
    sun = torch.stack([between(-0.72, -0.2), between(-0.7, 0.7), between(0.11, 0.2)], -1)
    halo = between(0.12, 0.3) * chance(0.75)

    has_lake = chance(0.5)
    base = torch.stack(
        [between(-0.08, 0.12), between(0.22, 0.34) + 0.12 * has_lake, between(0.56, 0.72)], -1
    )
    side = 2 * chance(0.5) - 1
    tilt = torch.stack([0 * side, side * has_lake * between(0.2, 0.35), between(-0.12, 0.12)], -1)
    waves = torch.stack([
        torch.stack([between(*amplitude), between(*frequency), between(0, 6.2832)], -1)
        for amplitude, frequency in (
            ((0.13, 0.24), (3.5, 6.0)), ((0.04, 0.09), (9.0, 14.0)),  # mountains
            ((0.06, 0.12), (2.0, 4.0)), ((0.01, 0.04), (5.0, 8.0)),  # middle hill
            ((0.04, 0.09), (1.5, 3.5)), ((0.01, 0.03), (4.0, 6.0)),  # near hill
        )
    ], 1).unflatten(1, (3, 2))  # fmt: skip
    snow = torch.where(chance(0.6) > 0, base[:, 0] - between(0.02, 0.14), -_NOWHERE)
    lake = torch.where(has_lake > 0, between(0.26, 0.36), _NOWHERE)
    rows = torch.stack([between(6, 11), base[:, 2] - between(0.3, 0.5), between(-0.8, 0.8)], -1)

    house_slot = between(0, _SLOTS).long().clamp(max=_SLOTS - 1)
    has_house = chance(0.5)
    things = torch.stack([
        torch.stack([x + between(-0.03, 0.03), between(0.3, 0.5), chance(0.5)], -1)
        for x in [2 * (i + 0.5) / _SLOTS - 1 for i in range(_SLOTS)]
    ], 1)  # fmt: skip
    things[torch.arange(n), house_slot, 2] *= 1 - has_house  # the house replaces a tree
    house = torch.stack(
        [things[torch.arange(n), house_slot, 0], between(0.13, 0.16) * has_house], -1
    )
    return Scenes(
        mood=mood, field=field, sky=sky, sun=sun, halo=halo, base=base, tilt=tilt, waves=waves,
        snow=snow, lake=lake, rows=rows, things=things, round_trees=chance(0.5), house=house,
    )  # fmt: skip


def _pick(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Return each scene's row of a table of colours, (n, 3, 1), with dtype and device of `like`."""
    return table.to(like)[index].unsqueeze(-1)


def _triangle(t: Tensor) -> Tensor:
    """Return the triangle wave of period 2 pi, 1 at t = 0."""
    u = t * 0.15915494
    return 4 * (u - (u + 0.5).floor()).abs_().neg_().add_(0.25)


def _edge(distance: Tensor, footprint: Tensor) -> Tensor:
    """Return how much of a pixel lies where the signed distance is negative."""
    return (0.5 - distance / footprint).clamp_(0, 1)


def _overlap(x: Tensor, extent: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the part of the pixel [x - extent/2, x + extent/2] that lies in [low, high]."""
    right = torch.minimum(x + extent / 2, high)
    return ((right - torch.maximum(x - extent / 2, low)) / extent).clamp_(0, 1)


def _disc(y: Tensor, x: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
    """Return the distance from the origin and the pixel's footprint along that direction."""
    distance = torch.hypot(y, x).clamp_min_(1e-6)
    return distance, torch.hypot(y * cell[0], x * cell[1]).div_(distance).clamp_min_(1e-6)


def _outline(scenes: Scenes, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the height of a rolling hill at x (n, N) and its slope there."""
    amplitude, frequency, phase = scenes.waves[:, layer].unsqueeze(-1).unbind(2)  # (n, 2, 1)
    tilt = scenes.tilt[:, layer, None]
    height = scenes.base[:, layer, None] + tilt * x
    slope = tilt
    for a, f, p in zip(amplitude.unbind(1), frequency.unbind(1), phase.unbind(1), strict=True):
        angle = f * x + p
        height = height - a * angle.sin()
        slope = slope - a * f * angle.cos()
    return height, slope


def _ridge(scenes: Scenes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mountains' height at x (n, N), their slope, and the main wave's phase."""
    (a, f, p), (b, g, q) = (wave.unsqueeze(-1).unbind(1) for wave in scenes.waves[:, 0].unbind(1))
    main, fine = f * x + p, g * x + q
    height = scenes.base[:, 0, None] - a * _triangle(main) - b * _triangle(fine)
    slope = (a * f * main.sin().sign() + b * g * fine.sin().sign()) * 0.63662
    return height, slope, main


def _paint(image: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    """Blend `colour` (n, 3, 1 or N) over the image (n, 3, N) with opacity alpha (n, N)."""
    return torch.lerp(image, colour.expand_as(image), alpha.unsqueeze(1))


def _sky(scenes: Scenes, y: Tensor, x: Tensor, cell: Cell) -> Tensor:
    """Return the sky (n, 3, N) with its sun or its moon and stars."""
    top, low = scenes.sky.unsqueeze(-1).unbind(1)  # (n, 3, 1)
    image = top + (low - top) * ((y + 1) / 1.2).clamp_(0, 1).pow_(1.3).unsqueeze(1)
    sun_y, sun_x, radius = scenes.sun.unsqueeze(-1).unbind(1)
    colour = _pick(_SUN, scenes.mood, y)
    distance_to_sun, sun_footprint = _disc(y - sun_y, x - sun_x, cell)
    night = (scenes.mood == 3).float()[:, None]
    if night.any():
        stars = _STARS.to(y)
        row, column = (((v + 1) * 5).floor_().clamp_(0, 9) for v in (y, x))
        dy, dx, size = stars[(row * 10 + column).long()].unbind(-1)
        star_y, star_x = (row + dy) / 5 - 1, (column + dx) / 5 - 1
        distance, footprint = _disc(y - star_y, x - star_x, cell)
        seen = torch.maximum(size, footprint / 2)  # smaller than a pixel: a dimmer disc of a pixel
        glow = _edge(distance - seen, footprint) * (size / seen) ** 2
        clear = torch.hypot(star_y - sun_y, star_x - sun_x) > 1.5 * radius  # of the moon
        glow = glow * clear * night
        image = _paint(image, torch.ones_like(top), glow)
    for ring in (2.6, 1.7):
        alpha = _edge(distance_to_sun - ring * radius, sun_footprint) * scenes.halo[:, None]
        image = _paint(image, colour, alpha)
    bite, bite_footprint = _disc(y - sun_y + 0.3 * radius, x - sun_x - 0.5 * radius, cell)
    crescent = 1 - night * _edge(bite - 0.85 * radius, bite_footprint)
    return _paint(image, colour, _edge(distance_to_sun - radius, sun_footprint) * crescent)


def _mountains(image: Tensor, scenes: Scenes, y: Tensor, x: Tensor, cell: Cell) -> Tensor:
    """Draw mountains with a sunny and a shady side, and their snow, over the image."""
    height, slope, phase = _ridge(scenes, x)
    covered = _edge(height - y, torch.hypot(cell[0], slope * cell[1]))
    # The shade is a square wave along a slanted line; its mean over a pixel is a difference of
    # triangle waves.
    frequency = scenes.waves[:, 0, 0, 1, None]
    phase = phase + frequency * 0.35 * (y - height).clamp_min_(0)
    half = frequency * (cell[1] + 0.35 * cell[0]) / 2
    shade = (_triangle(phase + half) - _triangle(phase - half)) * (0.7854 / half)  # in [-1, 1]
    light = 1 - 0.13 * shade.unsqueeze(1)
    line = scenes.snow[:, None] + 0.05 * _triangle(11 * x)
    snow = _edge(y - line, torch.hypot(cell[0], 0.35 * cell[1]))
    rock, white = (_pick(table, scenes.mood, y) for table in (_MOUNTAIN, _SNOW))
    colour = _paint(rock.expand_as(image), white, snow) * light
    return _paint(image, colour, covered)


def _lake(image: Tensor, scenes: Scenes, y: Tensor, cell: Cell) -> Tensor:
    """Tint the mirrored landscape below the shore, with ripples."""
    shore = scenes.lake[:, None]
    water = _edge(shore - y, cell[0])
    ripple = 0.16 * torch.sin(70 * (y - shore)) * torch.sinc(70 * cell[0] / 6.2832)
    return _paint(image, _pick(_WATER, scenes.mood, y), water * (0.4 + ripple))


def _trees(image: Tensor, scenes: Scenes, y: Tensor, x: Tensor, cell: Cell) -> Tensor:
    """Draw the trees over the image; a point is compared with the tree of its own fifth only."""
    light = _pick(_LIGHT, scenes.mood, y)
    slot = ((x + 1) * (_SLOTS / 2)).long().clamp_(0, _SLOTS - 1)
    middle, size, there = (v.gather(1, slot) for v in scenes.things.unbind(-1))
    ground = _outline(scenes, 2, scenes.things[..., 0])[0].gather(1, slot)
    x = x - middle
    up = ground - y
    trunk = _overlap(x, cell[1], -0.07 * size, 0.07 * size) * _overlap(
        up, cell[0], torch.tensor(-0.2), 0.4 * size
    )
    image = _paint(image, _TRUNK.to(y) * light, trunk * there)
    # Conifer: two triangles, the upper one smaller. Round: a disc.
    crown = torch.zeros_like(x)
    for low, high, wide in ((0.18, 0.78, 0.34), (0.5, 1.0, 0.25)):
        steep = wide / (high - low)
        side = _edge(x.abs() - steep * (high * size - up), torch.hypot(cell[1], steep * cell[0]))
        crown = torch.maximum(crown, side * _edge(low * size - up, cell[0]))
    distance, footprint = _disc(up - 0.62 * size, x, cell)
    disc = _edge(distance - 0.34 * size, footprint)
    crown = torch.lerp(crown, disc, scenes.round_trees[:, None])
    leaves = _pick(_LEAVES, scenes.round_trees.long(), y)
    return _paint(image, leaves * light, crown * there)


def _house(image: Tensor, scenes: Scenes, y: Tensor, x: Tensor, cell: Cell) -> Tensor:
    """Draw the house over the image: walls, roof, door, a window lit at dusk and at night."""
    light = _pick(_LIGHT, scenes.mood, y)
    middle, size = scenes.house.unsqueeze(-1).unbind(1)
    ground = _outline(scenes, 2, middle)[0]
    there = (size > 0).float()
    size = size.clamp_min(1e-3)
    x = x - middle
    up = ground + 0.2 * size - y

    def box(left: float, right: float, low: float, high: float) -> Tensor:
        across = _overlap(x, cell[1], left * size, right * size)
        return across * _overlap(up, cell[0], low * size, high * size) * there

    dark = (scenes.mood >= 2).view(-1, 1, 1)
    pane = torch.where(dark, _LAMP.to(y), 0.6 * _pick(_WATER, scenes.mood, y))
    image = _paint(image, _WALL.to(y) * light, box(-0.85, 0.85, -1, 1))
    image = _paint(image, _DOOR.to(y) * light, box(-0.6, -0.2, -1, 0.72))
    image = _paint(image, pane, box(0.15, 0.6, 0.32, 0.76))
    roof = _edge(x.abs() - 1.25 * (1.85 * size - up), torch.hypot(cell[1], 1.25 * cell[0]))
    roof = roof * _edge(size - up, cell[0]) * there
    return _paint(image, _ROOF.to(y) * light, roof)


def _field(image: Tensor, scenes: Scenes, y: Tensor, x: Tensor, cell: Cell) -> Tensor:
    """Draw the near hill over the image, with rows that run to a vanishing point."""
    light = _pick(_LIGHT, scenes.mood, y)
    height, slope = _outline(scenes, 2, x)
    frequency, far_y, far_x = scenes.rows.unsqueeze(-1).unbind(1)
    depth = (y - far_y).clamp_min(0.1)
    turn = frequency / depth  # the phase per unit of x
    phase = turn * (x - far_x)
    # A pixel averages the wave: a sinc along each axis, of the phase's change over it in turns.
    stripes = torch.sin(phase)
    stripes *= torch.sinc(turn * cell[1] / 6.2832) * torch.sinc(phase / depth * cell[0] / 6.2832)
    crop, ground = (_pick(table, scenes.field, y) * light for table in (_CROP, _GROUND))
    colour = _paint(ground.expand_as(image), crop, 0.5 + 0.5 * stripes)
    colour = colour * (1 - 0.35 * (y - height).clamp_(0, 1)).unsqueeze(1)
    return _paint(image, colour, _edge(height - y, torch.hypot(cell[0], slope * cell[1])))


def scene_colors(scenes: Scenes, coords: Tensor, cells: Tensor) -> Tensor:
    """Return the colours (B, N, 3) in [-1, 1] of B scenes at scattered points.

    `coords` is (B, N, 2), points (y, x) in [-1, 1]; `cells` is (B, 2), the extent (y, x) of the
    pixel that each scene's points stand for. Raises ValueError unless the three agree in B.
    """
    n = len(scenes)
    if coords.ndim != 3 or coords.shape[::2] != (n, 2) or cells.shape != (n, 2):
        shapes = f"{tuple(coords.shape)} and {tuple(cells.shape)}"
        raise InputError(f"{n} scenes need coords ({n}, N, 2) and cells ({n}, 2), got {shapes}")
    y, x = (v.contiguous() for v in coords.unbind(-1))  # (B, N)
    cell = cells[:, :1], cells[:, 1:]  # (B, 1) each
    # The lake is a mirror: below the shore, sky and mountains are those of the mirrored height.
    shore = scenes.lake[:, None]
    mirrored = shore - (y - shore).abs_()
    image = _sky(scenes, mirrored, x, cell)
    image = _mountains(image, scenes, mirrored, x, cell)
    image = _lake(image, scenes, y, cell)
    height, slope = _outline(scenes, 1, x)
    shade = (1.12 - 0.6 * (y - height).clamp(0, 1)).unsqueeze(1)
    hill = _pick(_HILL, scenes.mood, y) * shade
    image = _paint(image, hill, _edge(height - y, torch.hypot(cell[0], slope * cell[1])))
    image = _trees(image, scenes, y, x, cell)
    image = _house(image, scenes, y, x, cell)
    image = _field(image, scenes, y, x, cell)
    return image.mul_(2).sub_(1).clamp_(-1, 1).transpose(1, 2)  # (B, N, 3)


def render_scenes(scenes: Scenes, size: int | Size, window: Window | None = None) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of the scenes at `size`, or a window of each.

    A window `(top, left, height, width)` equals the crop of the whole image. Memory beyond the
    result is bounded: points are evaluated in blocks.
    """
    size = pixels.check_size(size)
    window = pixels.check_window(window, size)
    device = scenes.mood.device
    points = pixels.grid(size, window, device).flatten(0, 1)  # (N, 2)
    cell = pixels.cell(size, device)
    image = torch.empty(len(scenes), len(points), 3, device=device)
    group = max(1, _POINTS // len(points))
    for i in range(0, len(scenes), group):
        some = scenes[i : i + group]
        for j in range(0, len(points), _POINTS):
            block = points[j : j + _POINTS].expand(len(some), -1, 2)
            colours = scene_colors(some, block, cell.expand(len(some), 2))
            image[i : i + group, j : j + _POINTS] = colours
    return image.unflatten(1, window[2:]).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def _star_table() -> Tensor:
    """Return (100, 3): place (y, x) and radius of one star in each square of the sky."""
    dy, dx, size = _uniform(7, torch.arange(100), 3).unbind(1)
    return torch.stack([0.2 + 0.6 * dy, 0.2 + 0.6 * dx, 0.016 * size.pow(1.5) + 1e-4], -1)


_STARS = _star_table()
