"""Image files that are written: what can be, before anything is computed, and how."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

from arbscale import store
from arbscale.coords import Size
from arbscale.store import InputError

QUALITY = 95  # of formats that lose some: an enlarger's output is looked at closely
LOSSY = ("JPEG", "WEBP", "AVIF")
_KEPT = (270, 271, 272, 305, 306, 315, 33432, 34665, 34853)
"""EXIF's description, camera, software, time, artist, copyright, exposure and place."""
MAX_EXIF = 65_000  # bytes; JPEG holds little more, and microscopes describe at length
_STALE = (0xA002, 0xA003, 0xA005, 0x927C)
"""Of the exposure: sizes, interoperability, the maker's own offsets."""


def check_output(path: Path, size: Size, quality: int = QUALITY) -> None:
    """Raise ValueError or OSError unless an image of `size` can be written at `path`.

    A format's limits are those that it shows when one row and one column of these lengths are
    written in memory.
    """
    from PIL import Image

    if not 1 <= quality <= 100:
        raise InputError(f"--quality is from 1 to 100, got {quality}")
    kind, hint = _kind(path), f"name an image file such as {path.stem or 'out'}.png"
    if kind not in Image.SAVE:
        raise InputError(f"{path}: images cannot be written as {path.suffix or 'that'}; {hint}")
    whole = f"{size[0]} x {size[1]}"
    for height, width in ((1, size[1]), (size[0], 1)):
        try:
            _save(Image.new("RGB", (width, height)), file := io.BytesIO(), kind, quality)
            written = Image.open(file).size if kind in Image.OPEN else (width, height)
        except Exception as error:  # each format fails in its own way
            said = str(error) or type(error).__name__
            raise InputError(f"{path}: {whole} cannot be {kind} ({said}); {hint}") from error
        if written != (width, height):
            largest = max(written)
            raise InputError(f"{path}: {kind} would make {whole} at most {largest} long; {hint}")
    store.check_writable(path)


def _kind(path: Path) -> str:
    """Return PIL's name of the format that a file's ending means, or ""."""
    from PIL import Image

    Image.init()
    return Image.registered_extensions().get(path.suffix.lower(), "")


def _save(image: Any, file: Any, kind: str, quality: int = QUALITY, exif: bytes = b"") -> None:
    """Write a PIL image as a format that PIL names, at its best where the format loses some."""
    options: dict[str, Any] = {"quality": quality} if kind in LOSSY else {}
    if kind in ("JPEG", "AVIF"):
        options["subsampling"] = "4:4:4"
    if kind == "ICO":
        options["sizes"] = [image.size]
    if exif and kind in (*LOSSY, "PNG", "TIFF"):
        options["exif"] = exif
    image.save(file, kind, **options)


def write_image(image: Any, path: Path, quality: int = QUALITY, exif: bytes = b"") -> None:
    """Write a PIL image; at every moment the file is the old one or the new one, whole.

    Transparency is laid on white where the format has none.
    """
    from PIL import Image

    kind = _kind(path)
    if image.mode == "RGBA" and not holds_alpha(kind):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    with store.replacing(path) as draft:
        _save(image, draft, kind, quality, exif)


@functools.cache
def holds_alpha(kind: str) -> bool:
    """Return whether a format keeps transparency of more than two levels."""
    from PIL import Image

    file = io.BytesIO()
    try:
        _save(Image.new("RGBA", (2, 2), (9, 9, 9, 77)), file, kind)
        with Image.open(file) as back:
            return back.convert("RGBA").getpixel((0, 0))[3] in range(70, 85)
    except Exception:  # each format fails in its own way
        return False


def kept_exif(image: Any) -> bytes:
    """Return what EXIF tells of a photograph and stays true when it is enlarged and upright."""
    from PIL import Image

    try:
        found, kept = image.getexif(), Image.Exif()
        for tag in _KEPT:
            if tag in (34665, 34853):  # folders of tags: exposure and place
                if inner := {t: v for t, v in found.get_ifd(tag).items() if t not in _STALE}:
                    kept[tag] = inner
            elif tag in found:
                kept[tag] = found[tag]
        if 0xA001 in kept.get(34665, {}):
            kept[34665][0xA001] = 1  # sRGB
        content = kept.tobytes() if len(kept) else b""
        return content if len(content) <= MAX_EXIF else b""
    except Exception:  # damaged facts beside good pixels
        return b""
