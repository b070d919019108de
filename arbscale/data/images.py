"""Image files and arrays as tensors, resizing and cropping.

An image is a float32 tensor (3, H, W) in [-1, 1], RGB.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arbscale.coords import Size, check_size, scaled_size
from arbscale.data import pixels
from arbscale.data.pixels import on_white
from arbscale.store import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, by content. PIL's rarer decoders (one starts Ghostscript) are not used."""
MAX_PIXELS = 120_000_000
"""Of a file that is read: 0.36 GB as bytes, 1.4 GB as floats; while reading at most 2.4 GB."""
TOO_LARGE = f"over {MAX_PIXELS:,} pixels; cut it into parts"


def to_tensor(image: Any) -> Tensor:
    """Return an image as a float32 tensor (3, H, W) in [-1, 1].

    Takes a PIL image of any mode, turned upright and converted as `data.pixels` says (transparency
    is laid on white), an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8 or uint16, or a
    tensor (3, H, W) of uint8 or of floats that lie in [-1, 1] already. Raises ValueError for
    anything else.
    """
    if isinstance(image, Tensor):
        return _tensor_to_tensor(image)
    return _tensor_to_tensor(on_white(*open_upright(image)[:2]))


def open_upright(image: Any) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return a PIL image's or an array's colours, alpha and notes; see `pixels.open_upright`."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return _open_array(image)
    if isinstance(image, Image.Image) and image.width * image.height:
        return pixels.open_upright(image)
    found = type(image).__name__
    raise InputError(f"an image is a PIL image with pixels, an array or a tensor, got {found}")


def to_upright(image: Any) -> tuple[Any, list[str]]:
    """Return a PIL image as RGB or RGBA of 8 bits, upright, as sRGB; and what was converted."""
    from PIL import Image

    rgb, alpha, notes = open_upright(image)
    rgb = _eight_bits(rgb)
    levels = rgb if alpha is None else torch.cat([rgb, alpha])
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()), notes


def _tensor_to_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise InputError(f"an image is a tensor (3, H, W), got {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.float().div_(127.5).sub_(1)
    low, high = (value.item() for value in image.aminmax())
    if not image.is_floating_point() or not -1 - 1e-4 <= low <= high <= 1 + 1e-4:  # as for NaN
        found = f"{image.dtype} from {low:.3g} to {high:.3g}"
        raise InputError(f"wanted uint8 or floats in [-1, 1], got {found}; map [0, 1] by 2 * x - 1")
    return image.float().clamp(-1, 1)


def _open_array(array: np.ndarray) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return the colours, alpha and notes of an array of integers."""
    from PIL import Image

    channels = array.shape[2] if array.ndim == 3 else 1
    known = array.dtype in (np.uint8, np.uint16) and array.ndim in (2, 3) and array.size
    if not known or channels not in (1, 3, 4):
        raise InputError(
            "an array is uint8 or uint16, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got "
            f"{array.dtype} {array.shape}; floats go in as a tensor (3, H, W) in [-1, 1]"
        )
    if array.dtype == np.uint8 or channels == 1:
        array = array.reshape(array.shape[:2]) if channels == 1 else array
        return pixels.open_upright(Image.fromarray(array))
    levels = torch.from_numpy(array.astype("float32")).permute(2, 0, 1).contiguous()
    alpha = (levels[3:] / 257).round().byte() if channels == 4 else None
    return levels[:3] / (65535 / 2) - 1, alpha, ["16 bits, to 8"]


def to_uint8(image: Tensor) -> Tensor:
    """Return an image in [-1, 1] as uint8, rounded and clamped."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Any:
    """Return an image (3, H, W) in [-1, 1] as a PIL image, rounded and clamped to 8 bits.

    Raises ValueError for another shape, integers, NaN or infinity.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise InputError(f"wanted floats (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if not bool(image.isfinite().all()):
        raise InputError("an image holds NaN or infinity; wanted floats in [-1, 1]")
    return Image.fromarray(to_uint8(image.detach().float()).permute(1, 2, 0).cpu().numpy())


@contextmanager
def open_image(path: str | Path) -> Iterator[Any]:
    """Open an image file with PIL, reading its header only.

    Raises FileNotFoundError for no such file and ValueError for anything else that goes wrong, here
    or in the `with` block: damage, an unknown format, more than `MAX_PIXELS`, no permission.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image at {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # they name no file
            with _open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{image.height} x {image.width} is {TOO_LARGE}")
                yield image
    except Exception as error:  # a decoder fed with a damaged file may raise anything
        raise InputError(f"{path} cannot be read ({reason(error)}); replace it") from error


def _open(path: Path) -> Any:
    """Open a file with PIL; a PNG whose texts are too large for PIL, without them."""
    from PIL import Image

    try:
        return Image.open(path, formats=FORMATS)
    except ValueError:
        data = path.read_bytes()
        if not data.startswith(b"\x89PNG"):
            raise
        return pixels.without_texts(data)


def reason(error: BaseException) -> str:
    """Return in words, without the file's name, why a file cannot be used."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        return "no longer there"
    if isinstance(error, UnidentifiedImageError):
        return f"empty, damaged, or none of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r" \(\d+ bytes not processed\)", "", str(error)) or type(error).__name__


def load_pixels(path: str | Path) -> Tensor:
    """Read an image file as uint8 (3, H, W): `load_image` in a quarter of the memory."""
    with open_image(path) as image:
        rgb = on_white(*open_upright(image)[:2])
    return _eight_bits(rgb)


def _eight_bits(rgb: Tensor) -> Tensor:
    """Return colours (3, h, w), uint8 or in [-1, 1], as uint8, converted band by band."""
    if rgb.dtype == torch.uint8:
        return rgb
    return torch.cat([to_uint8(rgb[:, rows]) for rows in pixels.bands(*rgb.shape[-2:])], dim=1)


def load_image(path: str | Path) -> Tensor:
    """Read an image file as (3, H, W) in [-1, 1], turned upright as its EXIF tag says.

    Raises FileNotFoundError for no such file, ValueError for one that cannot be read.
    """
    with open_image(path) as image:
        return to_tensor(image)


def resize(image: Tensor, size: int | Size) -> Tensor:
    """Resize (3, H, W) or (B, 3, H, W) with PIL's bicubic: antialiased, a = -0.5.

    Values are clamped to [-1, 1]. Agrees with PIL up to its rounding to 8 bits between the axes.
    """
    if image.ndim not in (3, 4) or not image.is_floating_point():
        found = f"{image.dtype} {tuple(image.shape)}"
        raise InputError(f"resize takes floats (3, H, W) or (B, 3, H, W), got {found}")
    batch = image if image.ndim == 4 else image[None]
    wide = batch if batch.dtype == torch.float64 else batch.float()  # the CPU has no half
    wide = wide.cpu() if wide.device.type == "mps" else wide  # which lacks antialiased resampling
    resized = F.interpolate(wide, check_size(size), mode="bicubic", antialias=True).clamp(-1, 1)
    return (resized if image.ndim == 4 else resized[0]).to(image)


def resize_alpha(alpha: Tensor, size: Size) -> Tensor:
    """Return alpha (1, h, w) of uint8 at another size, by PIL's bicubic."""
    from PIL import Image

    plane = Image.fromarray(alpha[0].numpy())
    resized = plane.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))[None]


def like(out: Tensor, image: Any, alpha: Tensor | None) -> Any:
    """Return `out` (3, H, W) as the kind that `image` is, with its alpha (1, h, w) enlarged."""
    from PIL import Image

    if isinstance(image, Tensor):
        return out.to(image.device)
    if alpha is not None:
        out = torch.cat([out, resize_alpha(alpha, out.shape[-2:])])
    array = out.permute(1, 2, 0).contiguous().numpy()
    return array if isinstance(image, np.ndarray) else Image.fromarray(array)


def random_crop(
    image: Tensor, size: int | Size, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random crop (3, *size) of an image (3, H, W).

    An image smaller than the crop is continued by reflection at its borders, as often as needed,
    and not enlarged: a super-resolution model learns its sharpness.
    """
    index = []
    for n, wanted in zip(image.shape[-2:], check_size(size), strict=True):
        low, high = sorted((0, n - wanted))
        start = int(torch.randint(low, high + 1, (), generator=generator))
        rows = torch.arange(start, start + wanted) % (2 * n)
        mirrored = torch.minimum(rows, 2 * n - 1 - rows)  # folded back into [0, n) at both ends
        index.append(slice(start, start + wanted) if n >= wanted else mirrored)
    return image[:, index[0]][:, :, index[1]]


def training_crop(image: Tensor, size: int | Size, seed: int) -> Tensor:
    """Return a random crop (3, *size), flipped left to right half of the time."""
    generator = torch.Generator().manual_seed(seed)
    crop = random_crop(image, size, generator)
    return crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop


def low_high_pair(image: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return a low-resolution image (3, h, w) and its ground truth of size `round(scale * low)`.

    The low size is the largest that fits. The ground truth is the image (3, H, W) without its last
    rows and columns; the low-resolution image is its antialiased bicubic reduction. Raises
    ValueError for a scale below 1 or one that leaves no pixel.
    """
    height, width = image.shape[-2:]
    if not 1 <= scale <= min(height, width):
        limit = f"from 1 to {min(height, width)}"
        raise InputError(f"the scale of an image of {height} x {width} is {limit}, got {scale!r}")
    low = [int((n + 0.5) / scale) for n in (height, width)]
    low = [m - (round(scale * m) > n) for m, n in zip(low, (height, width), strict=True)]
    high_size = scaled_size((low[0], low[1]), scale)
    high = image[..., : high_size[0], : high_size[1]]
    return resize(high, (low[0], low[1])), high
