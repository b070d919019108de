"""Latents of many images, encoded once and read from disk by memory map.

A cache is a folder with one file per array and a record, written last, whose key stands for the
encoder's weights, the images and the seed that the latents came from.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arbscale import store
from arbscale.store import InputError

RECORD = "record.json"
Parts = Callable[[], Iterator[tuple[Tensor, ...]]]
"""`parts()` yields the arrays piece by piece: tensors (b, ...) of equal b."""


@dataclass(frozen=True)
class Latents:
    """Arrays (N, c, h, w) of equal N, in memory or on disk: latents, and conditions if any."""

    arrays: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        """Return N."""
        return len(self.arrays[0])

    def __getitem__(self, picks: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each array."""
        return tuple(torch.from_numpy(np.asarray(a[picks.numpy()])) for a in self.arrays)

    def std(self) -> float:
        """Return the standard deviation of the latents, as `Tensor.std` defines it."""
        return torch.from_numpy(np.asarray(self.arrays[0])).std().item()


def in_memory(parts: Parts) -> Latents:
    """Hold the arrays in memory."""
    return Latents(tuple(torch.cat(pieces).numpy() for pieces in zip(*parts(), strict=True)))


def cached(folder: Path, key: str, count: int, parts: Parts) -> Latents:
    """Open the cache in `folder`; encode again where there is none or it has another key.

    `count` is N. Raises OSError where it cannot be written, RuntimeError where another process is
    writing it.
    """
    found = _open(folder, key)
    if found is None:
        with store.locked(folder):
            _write(folder, key, count, parts)
            found = _open(folder, key)
    return found


def _open(folder: Path, key: str) -> Latents | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["key"] != key:
            raise InputError("of other weights or images")
        # Copy-on-write: PyTorch takes no read-only arrays.
        return Latents(
            tuple(np.load(folder / n, mmap_mode="c", allow_pickle=False) for n in record["files"])
        )
    except (OSError, ValueError, *store.STRAY) as error:
        if (folder / RECORD).exists():
            warnings.warn(f"{folder} cannot be used ({error}); encoding again", stacklevel=3)
        return None


def _write(folder: Path, key: str, count: int, parts: Parts) -> None:
    (folder / RECORD).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        files: list[Any] = []
        for pieces in parts():
            if not files:
                paths = [folder / f"{i}.npy" for i in range(len(pieces))]
                drafts = [stack.enter_context(store.replacing(path)) for path in paths]
                files = [stack.enter_context(draft.open("wb")) for draft in drafts]
                for file, piece in zip(files, pieces, strict=True):
                    # Written, for a memory map would end in SIGBUS on a full disk.
                    shape = (count, *piece.shape[1:])
                    head = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, head)
            for file, piece in zip(files, pieces, strict=True):
                file.write(piece.contiguous().numpy().tobytes())
    store.write_text(folder / RECORD, json.dumps({"key": key, "files": [p.name for p in paths]}))
