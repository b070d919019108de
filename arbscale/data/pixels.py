"""What a PIL image's values mean: the one place that converts or refuses them.

| image | decision |
| --- | --- |
| greyscale, palette, CMYK, YCbCr, LAB | converted to RGB |
| colour profile | converted to sRGB; a damaged one is ignored |
| grey of 12 or 16 bits | its white is 4095 or 65535; WhiteIsZero is inverted |
| RGB of 16 bits | PIL reads the upper 8 bits |
| transparency | kept as a separate alpha channel |
| EXIF orientation | turned upright; a damaged tag is ignored |
| animated, several pages | the first frame |
| floats, 32 bits, signed integers | refused: their black and white are not known |
| 16 bits in separate planes | refused: PIL mixes them up |

PIL keeps many of these facts beside the pixels and drops them once the pixels are there, so they
are read from the header first.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.store import InputError

BAND = 1 << 22  # pixels that are converted at a time
LARGE = 1 << 20  # bytes: PIL refuses texts and profiles of more in a PNG
DROPPED = "texts or profile of over 1 MB, ignored"
SAME = 2  # levels: a profile that changes no colour by more is sRGB
_MODES = {
    "1": "black and white, to RGB",
    "L": "greyscale, to RGB",
    "LA": "greyscale, to RGB",
    "La": "greyscale, to RGB",
    "P": "palette, to RGB",
    "PA": "palette, to RGB",
    "CMYK": "CMYK, to RGB",
    "YCbCr": "YCbCr, to RGB",
    "LAB": "LAB, to RGB",
    "HSV": "HSV, to RGB",
}
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of profiles, by mode
_PHOTOMETRIC, _BITS, _FORMAT, _PLANAR, _ORIENTATION = 262, 258, 339, 284, 274  # TIFF's tags


def open_upright(image: Any) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return the colours and the transparency of a PIL image, turned upright, as sRGB.

    Returns
    -------
    tuple
        Colours (3, h, w): uint8, or floats in [-1, 1] for grey of over 8 bits; alpha (1, h, w) of
        uint8, or None for an opaque image; notes, what was converted in words.

    Raises ValueError for an image whose values have no known meaning.

    """
    from PIL import ImageOps

    notes, white, inverted, small = _header(image)
    image = _loaded(image)
    # Turning copies the image, so one that lies upright is not touched.
    if quiet(lambda: image.getexif().get(_ORIENTATION) in range(2, 9)):
        image = ImageOps.exif_transpose(image)
        notes += [ORIENTED] if ORIENTED not in notes else []
    if image.info.get(DROPPED):
        notes.append(DROPPED)
    profile = image.info.get("icc_profile")
    if not profile and abs(image.info.get("gamma", 0.45455) - 0.45455) > 0.01:
        notes.append(f"gamma {image.info['gamma']:.3g}, ignored")
    rgb, alpha = _deep(image, white, inverted) if white else _shallow(image, small, notes)
    if alpha is not None:
        notes.append("transparency, laid on white unless the output keeps it")
    if profile and white:  # of grey, whose profile takes 8 bits
        from PIL import Image

        grey = Image.fromarray(((rgb[0] + 1) * 127.5).round().byte().numpy())
        if (converted := _to_srgb(grey, profile, notes)) is not grey:
            rgb = planes(converted)
    return rgb, alpha, notes


ORIENTED = "turned upright as EXIF says"


def _header(image: Any) -> tuple[list[str], float, bool, int]:
    """Return what the header says: notes, white of deep grey (or 0), whether white is 0, bits."""
    tags = getattr(image, "tag_v2", None) or {}
    bits, formats = (set(np.atleast_1d(tags.get(tag, 1)).tolist()) for tag in (_BITS, _FORMAT))
    kind = getattr(image, "format", None)
    if image.mode == "F":
        raise InputError("an image of floats has no known white; convert it to 8 bits")
    if image.mode == "I" and (kind not in ("PNG", "PPM", "TIFF") or max(bits) > 16):
        raise InputError("an image of over 16 bits has no known white; convert it to 8 bits")
    if 2 in formats:
        raise InputError("an image of signed integers has no known black; convert it to 8 bits")
    if tags.get(_PLANAR) == 2 and max(bits) > 8 and image.mode not in ("I", "I;16", "I;16B"):
        raise InputError("16 bits in planes stored apart cannot be read; save them interleaved")
    codec, args = (
        (image.tile[0][0], image.tile[0][-1]) if getattr(image, "tile", None) else ("", ())
    )
    args = (args,) if isinstance(args, str) else tuple(args or ())
    raw = next((str(arg) for arg in args if isinstance(arg, str)), "")
    most = args[-1] if codec.startswith("ppm") and isinstance(args[-1], int) else 255
    white = (4095.0 if bits == {12} else 65535.0) if image.mode.startswith("I") else 0.0
    deep = white or ";16" in raw or most > 255 or (tags and max(bits) > 8)
    found = {
        "several frames or pages, the first is taken": quiet(lambda: image.is_animated),
        f"{'12' if white == 4095 else '16'} bits, to 8": bool(deep),
        _MODES.get(image.mode, ""): image.mode in _MODES,
        # A TIFF turns itself when it is loaded, and drops the tag.
        ORIENTED: tags and tags.get(_ORIENTATION) in range(2, 9),
    }
    small = {"1": 1, "L;2": 2, "L;4": 4}.get(raw, 8) if kind == "PNG" else 8
    small = 16 if deep and not white else small
    notes = [text for text, is_so in found.items() if is_so]
    return notes, white, tags.get(_PHOTOMETRIC) == 0, small


def _loaded(image: Any) -> Any:
    """Return an image with its pixels; a PNG's texts after them may be too large for PIL."""
    name = getattr(image, "filename", None)
    try:
        image.load()
    except ValueError:
        if getattr(image, "format", None) != "PNG" or not name:
            raise
        with open(name, "rb") as file:
            image = without_texts(file.read())
        image.load()
    return image


def without_texts(data: bytes) -> Any:
    """Open a PNG file without its texts and a large profile, which PIL refuses."""
    from PIL import Image

    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"iCCP":
            packed = data[at + 8 : end - 4].partition(b"\0")[2][1:]
            dropped = len(zlib.decompressobj().decompress(packed, LARGE)) == LARGE
        else:
            dropped = kind in (b"tEXt", b"zTXt", b"iTXt")
        if not dropped:
            kept.append(data[at:end])
        at = end
    image = Image.open(io.BytesIO(b"".join(kept)), formats=("PNG",))
    image.info[DROPPED] = True
    return image


def _deep(image: Any, white: float, inverted: bool) -> tuple[Tensor, Tensor | None]:
    """Return grey of over 8 bits as floats (3, h, w) in [-1, 1], and its alpha."""
    levels = np.asarray(image)
    clear = image.info.get("transparency")
    alpha = None if clear is None else torch.from_numpy((levels != clear)[None]).byte().mul_(255)
    grey = torch.from_numpy(levels.astype("float32")).div_(white / 2).sub_(1).clamp_(-1, 1)
    return (grey.neg_() if inverted else grey).expand(3, -1, -1), alpha


def _shallow(image: Any, bits: int, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Return an image that PIL holds in 8 bits as uint8 (3, h, w), and its alpha."""
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    alpha = None
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode == "PA" or (image.mode == "P" and clear is not None):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = planes(image.getchannel("A"))
        image = image.convert(image.mode[:-1])
    elif clear is not None and image.mode in ("1", "L", "RGB"):
        clear = np.atleast_1d(clear)
        if bits < 8 and clear.max() < 1 << bits:  # PIL widens the pixels, and not always this
            clear = clear * (255 // ((1 << bits) - 1))
        clear = clear >> 8 if bits == 16 else clear
        alpha = _unlike(planes(image.convert("L") if image.mode == "1" else image), clear)
    if image.mode not in _SPACES:
        lab = image.mode == "LAB"
        image = image.convert("L" if image.mode == "1" else "RGB")
        profile = None if lab else profile
    if profile:
        image = _to_srgb(image, profile, notes)
    return planes(image if image.mode == "RGB" else image.convert("RGB")), alpha


def _unlike(levels: Tensor, clear: np.ndarray) -> Tensor:
    """Return alpha (1, h, w): 0 where all levels (c, h, w) are those of the clear colour."""
    same = torch.ones_like(levels[:1], dtype=torch.bool)
    for plane, level in zip(levels, clear.tolist(), strict=False):
        same &= plane == level
    return (~same).byte().mul_(255)


def planes(image: Any) -> Tensor:
    """Return a PIL image of 8 bits as uint8 (c, h, w), converted band by band."""
    c, (width, height) = len(image.getbands()), image.size
    out = torch.empty(c, height, width, dtype=torch.uint8)
    for rows in bands(height, width):
        part = np.array(image.crop((0, rows.start, width, rows.stop)))
        part = torch.from_numpy(part).view(rows.stop - rows.start, width, c)
        out[:, rows] = part.permute(2, 0, 1)
    return out


def bands(height: int, width: int) -> Iterator[slice]:
    """Yield slices of rows that hold about `BAND` pixels each."""
    step = max(1, BAND // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def on_white(rgb: Tensor, alpha: Tensor | None) -> Tensor:
    """Lay colours (3, h, w), uint8 or in [-1, 1], on white where alpha (1, h, w) says so."""
    if alpha is None:
        return rgb
    out = torch.empty_like(rgb)
    for rows in bands(*rgb.shape[-2:]):
        share = alpha[:, rows].int()
        if rgb.dtype == torch.uint8:
            out[:, rows] = (rgb[:, rows].int() * share + 255 * (255 - share) + 127) // 255
        else:
            out[:, rows] = 1 + (rgb[:, rows] - 1) * (share / 255)
    return out


def fill_clear(rgb: Tensor, alpha: Tensor | None) -> Tensor:
    """Give pixels that cannot be seen the colours around them, so that edges have no fringe.

    Takes and returns uint8 or floats (3, h, w); where alpha (1, h, w) is over 0 nothing changes.
    """
    if alpha is None or bool(alpha.all()) or not bool(alpha.any()):
        return rgb
    seen = (alpha > 0).float()
    filled = _spread(rgb.float() * seen, seen)
    return torch.where(
        alpha > 0, rgb, filled.round().to(rgb) if rgb.dtype == torch.uint8 else filled
    )


def _spread(colours: Tensor, seen: Tensor) -> Tensor:
    """Return colours (3, h, w) with those that are not seen taken from means of ever more pixels.

    `colours` are 0 where `seen` (1, h, w) is.
    """
    if bool(seen.all()):
        return colours
    means, share = (F.avg_pool2d(x[None], 2, ceil_mode=True)[0] for x in (colours, seen))
    coarse = _spread(means / share.clamp(min=1e-9) * (share > 0), (share > 0).float())
    large = F.interpolate(coarse[None], scale_factor=2.0, mode="nearest")[0]
    return torch.where(seen > 0, colours, large[:, : colours.shape[1], : colours.shape[2]])


def _to_srgb(image: Any, profile: bytes, notes: list[str]) -> Any:
    """Return an L, RGB or CMYK image as sRGB; it is taken as it is where the profile is damaged."""
    from PIL import ImageCms

    try:
        name, transform = _transform(profile, image.mode)
        if transform is None:
            return image
        out = ImageCms.applyTransform(image, transform)
    except Exception:  # whatever damaged bytes lead to
        notes.append("a damaged or unsuitable colour profile, ignored")
        return image
    notes.append(f"colour profile {name!r}, to sRGB")
    return out


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> tuple[str, Any]:
    """Return a profile's name and its transform to sRGB, None where it is sRGB itself."""
    from PIL import Image, ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space.strip() != _SPACES[mode]:
        raise InputError(f"a profile of {source.profile.xcolor_space} does not suit {mode}")
    intent = source.profile.rendering_intent
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    name = " ".join(ImageCms.getProfileDescription(source).split())[:60] or "without a name"
    if mode != "CMYK":
        levels = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype="uint8")
        cube = np.stack(np.meshgrid(*[levels] * len(mode)), -1)
        probe = Image.fromarray(cube.reshape(1, -1, 3) if mode == "RGB" else cube.reshape(1, -1))
        changed = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if abs(changed - np.asarray(probe.convert("RGB")).astype(int)).max() <= SAME:
            return name, None
    return name, transform


def quiet(question: Callable[[], bool]) -> bool:
    """Return the answer, or False where damage beside good pixels prevents one."""
    try:
        return bool(question())
    except Exception:
        return False
