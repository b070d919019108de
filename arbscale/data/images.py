"""Pictures in, out, and to size.

A picture is a float32 tensor (3, H, W) in [-1, 1], RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import Size, check_size, scaled_size

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, by content; PIL's rarer decoders (one of them starts Ghostscript) stay shut."""
MAX_PIXELS = 120_000_000
"""Of a file that is read: 0.36 GB as bytes, 1.4 GB as floats."""


def _levels(image: Any) -> tuple[Any, float]:
    """Return a PIL picture as an array (H, W, 3) and the value of its white."""
    from PIL import Image

    if image.mode.startswith("I"):  # sixteen bits of grey, which "I" holds in 32
        levels = np.asarray(image).astype("float32")
        if not 0 <= levels.min() <= levels.max() <= 65535:
            raise ValueError(
                "a picture of more than 16 bits has no known white; convert it to 8 bits"
            )
        return np.repeat(levels[..., None], 3, -1), 65535.0
    if image.mode == "F":
        raise ValueError("a picture of floats has no known white; convert it to 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB")), 255.0


def to_tensor(image: Any) -> Tensor:
    """Return a picture as a float32 tensor (3, H, W) in [-1, 1].

    Takes a PIL picture of any mode (transparency is laid on white), an array (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4) of uint8 or uint16, or a tensor (3, H, W) of uint8 or of floats that lie
    in [-1, 1] already. Raises ValueError for anything else.
    """
    from PIL import Image

    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"a picture is a tensor (3, H, W), got {tuple(image.shape)}")
        if image.dtype == torch.uint8:
            return image.float() / 127.5 - 1
        # NaN fails this comparison too.
        if not image.is_floating_point() or not bool((image.abs() <= 1 + 1e-4).all()):
            raise ValueError(
                f"a picture is uint8 or floats in [-1, 1], got {image.dtype} from "
                f"{image.min().item():.3g} to {image.max().item():.3g}; map [0, 1] by 2 * image - 1"
            )
        return image.float().clamp(-1, 1)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 1
        known = image.dtype in (np.uint8, np.uint16) and image.ndim in (2, 3) and image.size
        if not known or channels not in (1, 3, 4):
            raise ValueError(
                "an array is uint8 or uint16, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got "
                f"{image.dtype} {image.shape}; floats go in as a tensor (3, H, W) in [-1, 1]"
            )
        image = image.reshape(*image.shape[:2], channels)
        if channels == 4 and image.dtype == np.uint8:
            return to_tensor(Image.fromarray(image))
        white = float(np.iinfo(image.dtype).max)
        levels = image[..., :3].astype("float32")
        if channels == 4:
            levels = white + (levels - white) * (image[..., 3:].astype("float32") / white)
        levels = np.repeat(levels, 3, -1) if channels == 1 else levels
    elif isinstance(image, Image.Image):
        if not image.width * image.height:
            raise ValueError("the picture has no pixels")
        levels, white = _levels(image)
    else:
        raise ValueError(f"a picture is a PIL image, an array or a tensor, got {type(image)}")
    tensor = torch.from_numpy(levels).permute(2, 0, 1).float()  # (3, H, W)
    return (tensor / (white / 2) - 1).contiguous()


def to_uint8(image: Tensor) -> Tensor:
    """Return a picture in [-1, 1] as uint8, rounded and clamped."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Any:
    """Return a picture (3, H, W) in [-1, 1] as a PIL image, rounded and clamped to 8 bits."""
    from PIL import Image

    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture is a tensor (3, H, W), got {tuple(image.shape)}")
    if not image.is_floating_point() or not bool(image.isfinite().all()):
        raise ValueError(
            f"a picture has finite floats in [-1, 1], got {image.dtype}, NaN or infinity"
        )
    return Image.fromarray(to_uint8(image.detach().float()).permute(1, 2, 0).cpu().numpy())


@contextmanager
def open_image(path: str | Path) -> Iterator[Any]:
    """Open a picture file with PIL; its header alone has been read.

    Raises FileNotFoundError for no such file and ValueError for anything else that goes wrong, here
    or in the `with` block: damage, an unknown format, more than `MAX_PIXELS`, no permission.
    """
    from PIL import Image

    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.height} x {image.width} is over {MAX_PIXELS // 10**6} million "
                    "pixels; cut it into parts"
                )
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture at {path}; check the path") from None
    except Exception as error:  # a decoder fed with a damaged file may raise anything
        raise ValueError(
            f"{path} cannot be read as a picture ({reason(error)}); replace it"
        ) from error


def reason(error: BaseException | None) -> str:
    """Return in words, without the file's name, what `open_image` stumbled over."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"empty, damaged, or none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def decode(image: Any) -> Tensor:
    """Decode what `open_image` opened, its first frame or page, and turn it upright."""
    from PIL import ImageOps

    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag beside good pixels: they are taken as they lie
        pass
    return to_tensor(image)


def load_image(path: str | Path) -> Tensor:
    """Read a picture file as (3, H, W) in [-1, 1], turned upright as its EXIF tag says.

    Raises FileNotFoundError for no such file, ValueError for one that is no readable picture.
    """
    with open_image(path) as image:
        return decode(image)


def resize(image: Tensor, size: int | Size) -> Tensor:
    """Resize (3, H, W) or (B, 3, H, W) with PIL's bicubic: antialiased, a = -0.5.

    Values are clamped to [-1, 1]. Agrees with PIL up to its rounding to 8 bits between the axes.
    """
    if image.ndim not in (3, 4) or not image.is_floating_point():
        raise ValueError(
            f"resize takes floats (3, H, W) or (B, 3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    batch = image if image.ndim == 4 else image[None]
    resized = F.interpolate(batch, check_size(size), mode="bicubic", antialias=True).clamp(-1, 1)
    return resized if image.ndim == 4 else resized[0]


def _mirrored(start: int, length: int, n: int) -> Tensor:
    """Return `length` indices from `start` on, folded back into [0, n) at both ends."""
    index = torch.arange(start, start + length) % (2 * n)
    return torch.minimum(index, 2 * n - 1 - index)


def random_crop(
    image: Tensor, size: int | Size, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random crop of a picture (3, H, W).

    Where the picture is smaller than the crop it is continued by reflection at its borders, as
    often as needed, rather than enlarged: its sharpness is what a super-resolution model learns.
    """
    index = []
    for n, wanted in zip(image.shape[-2:], check_size(size), strict=True):
        spare = n - wanted
        low, high = min(0, spare), max(0, spare)
        start = int(torch.randint(low, high + 1, (), generator=generator))
        index.append(slice(start, start + wanted) if spare >= 0 else _mirrored(start, wanted, n))
    return image[:, index[0]][:, :, index[1]]


def low_high_pair(image: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return a low-resolution picture and the high one of exactly `round(scale * low)`.

    The low size is the largest that fits; the high picture loses its last rows and columns, and
    the low one is its antialiased bicubic reduction. Raises ValueError for a scale below 1 or one
    that leaves no pixel.
    """
    height, width = image.shape[-2:]
    if not 1 <= scale <= min(height, width):
        raise ValueError(
            f"a picture of {height} x {width} is reduced by a scale from 1 to "
            f"{min(height, width)}, got {scale!r}"
        )
    low = [int((n + 0.5) / scale) for n in (height, width)]
    low = [m - (round(scale * m) > n) for m, n in zip(low, (height, width), strict=True)]
    high_size = scaled_size((low[0], low[1]), scale)
    high = image[..., : high_size[0], : high_size[1]]
    return resize(high, (low[0], low[1])), high
