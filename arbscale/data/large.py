"""Images larger than memory: a TIFF file written band by band, and resumed after a stop.

The draft is a valid tiled BigTIFF from the start, whose tiles fill up from the top. Its own list of
tiles is the record of what is done: a tile is entered when its pixels are on the disk.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from arbscale import store
from arbscale.coords import Size
from arbscale.data.images import to_uint8
from arbscale.store import InputError

TILE = 256  # pixels; a row of tiles is held in memory
_CODES = {3: "<H", 4: "<I", 16: "<Q"}  # how a TIFF file's types are packed


def write_tiff(
    path: str | Path, size: Size, key: str, bands: Callable[[int], Iterable[Tensor]]
) -> None:
    """Write an image of any size; after a stop the same call resumes at the last row of tiles.

    Until it is whole, `path` stays as it was, and the draft beside it has `.part` added to its
    name. Raises ValueError for a name of another kind, RuntimeError where another process writes
    it, and KeyboardInterrupt or OSError (a full disk) that say how far it got.

    Parameters
    ----------
    path
        A TIFF file.
    size
        (height, width).
    key
        Names the content. A draft of another key is begun anew, a whole file of this key is left.
    bands
        `bands(row)` yields the image from a row on, in bands (3, n, width) in [-1, 1].

    """
    if Path(path).suffix.lower() not in (".tif", ".tiff"):
        raise InputError(f"{path} is written in bands, as a TIFF file; name it .tif")
    path = Path(os.path.realpath(path))  # a link stays one
    draft = path.with_name(path.name + ".part")
    with store.locked(path):
        if (whole := _Tiles.read(path, size, key)) and whole.done == whole.rows:
            return
        tiles = _Tiles.read(draft, size, key) or _Tiles.create(draft, size, key)
        row = min(tiles.done * TILE, size[0])
        bar = tqdm(desc=path.name, unit="row", total=size[0], initial=row)
        try:
            with bar, draft.open("r+b") as file:
                file.truncate(tiles.end)
                for pixels in _rows_of_tiles(bands(row), size, row, bar):
                    tiles.append(file, pixels)
        except (KeyboardInterrupt, OSError) as stop:
            why = f" ({stop.strerror or stop})" if isinstance(stop, OSError) else ""
            text = f"{draft} has {min(tiles.done * TILE, size[0])} of {size[0]} rows{why}"
            raise type(stop)(f"{text}; rerun the same command to resume") from None
        except Exception:
            if not tiles.done:  # a refusal, not a stop: there is nothing to resume
                draft.unlink()
            raise
        if tiles.done < tiles.rows:
            raise InputError(f"the bands of {path} have fewer than its {size[0]} rows")
        store.sync(draft)
        draft.replace(path)
        store.sync(path.parent)


def _rows_of_tiles(
    bands: Iterable[Tensor], size: Size, row: int, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yield 8-bit pixels (TILE, width, 3) of bands from `row` on; zeros below the image."""
    pixels, filled = np.zeros((TILE, size[1], 3), np.uint8), 0
    for band in bands:
        band = to_uint8(band).permute(1, 2, 0).cpu().numpy()
        while len(band):
            part, band = band[: TILE - filled], band[TILE - filled :]
            pixels[filled : filled + len(part)] = part
            filled, row = filled + len(part), row + len(part)
            bar.update(len(part))
            if filled == TILE or row == size[0]:
                pixels[filled:] = 0
                yield pixels
                filled = 0


@dataclass
class _Tiles:
    """A TIFF file's list of its tiles: where each lies, and in how many bytes."""

    lists: list[tuple[int, str]]  # where places and sizes are listed, and how they are packed
    end: int  # of the listed tiles, in bytes of the file
    columns: int  # of tiles
    rows: int
    done: int  # rows that are listed

    @classmethod
    def create(cls, path: Path, size: Size, key: str) -> _Tiles:
        """Write a file without a tile."""
        import tifffile

        tifffile.imwrite(
            path,
            itertools.repeat(b"", math.prod(math.ceil(n / TILE) for n in size)),
            shape=(*size, 3),
            dtype="uint8",
            tile=(TILE, TILE),
            photometric="rgb",
            bigtiff=True,
            byteorder="<",
            compression="zlib",
            predictor=True,
            metadata=None,
            software=f"arbscale {key}",
        )
        return cls.read(path, size, key)

    @classmethod
    def read(cls, path: Path, size: Size, key: str) -> _Tiles | None:
        """Return the list of a file of this size and key, or None for any other."""
        import tifffile

        rows, columns = (math.ceil(n / TILE) for n in size)
        try:
            with tifffile.TiffFile(path) as file:
                page = file.pages.first
                if page.shape != (*size, 3) or page.software != f"arbscale {key}":
                    return None
                tags = page.tags["TileOffsets"], page.tags["TileByteCounts"]
                lists = [(tag.valueoffset, _CODES[tag.dtype]) for tag in tags]
                tiles = zip(page.dataoffsets, page.databytecounts, strict=True)
                ends = [place + n for place, n in tiles if place and n]
                end = max(ends, default=path.stat().st_size)
        except Exception:  # each other file fails in its own way
            return None
        return cls(lists, end, columns, rows, len(ends) // columns)

    def append(self, file: BinaryIO, pixels: np.ndarray) -> None:
        """Add a row of tiles: first the pixels, then, when they are on the disk, their places."""
        file.seek(self.end)
        places, sizes = [], []
        for left in range(0, pixels.shape[1], TILE):
            tile = np.zeros((TILE, TILE, 3), np.uint8)
            part = pixels[:, left : left + TILE]
            tile[:, : part.shape[1]] = part
            tile[:, 1:] -= tile[:, :-1].copy()  # the predictor: differences to the left
            data = zlib.compress(tile.tobytes())
            places.append(file.tell())
            sizes.append(file.write(data))
        end = file.tell()
        file.flush()
        os.fsync(file.fileno())
        for (start, code), values in zip(self.lists, (places, sizes), strict=True):
            file.seek(start + self.done * self.columns * struct.calcsize(code))
            file.write(b"".join(struct.pack(code, value) for value in values))
        file.flush()
        self.end, self.done = end, self.done + 1
