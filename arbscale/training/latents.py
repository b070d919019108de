"""Latents of many pictures, encoded once and read from disk by memory map.

A cache is a folder with an array file each and a record, which names the encoder's weights, the
pictures and the seed that they came from. It gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def fingerprint(module: nn.Module, *facts: object) -> str:
    """Return a hash of a module's weights and of facts that JSON can hold."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_memory(parts: Parts) -> Latents:
    """Hold the arrays in memory."""
    return Latents(tuple(torch.cat(pieces).numpy() for pieces in zip(*parts(), strict=True)))


def cached(folder: Path, key: str, count: int, parts: Parts) -> Latents:
    """Open the cache in `folder`; where there is none or it has another key, make it anew.

    `count` is N. Raises OSError where it cannot be written.
    """
    found = _open(folder, key)
    if found is None:
        _write(folder, key, count, parts)
        found = _open(folder, key)
    return found


def _open(folder: Path, key: str) -> Latents | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["key"] != key:
            print(f"latents: those in {folder} are of other weights or pictures; encoding again")
            return None
        # Copy-on-write: PyTorch takes no read-only arrays.
        return Latents(
            tuple(np.load(folder / n, mmap_mode="c", allow_pickle=False) for n in record["files"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"latents: those in {folder} are damaged ({error}); encoding again")
        return None


def _write(folder: Path, key: str, count: int, parts: Parts) -> None:
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files: list[Any] = []
        for pieces in parts():
            if not files:
                names = [draft / f"{i}.npy" for i in range(len(pieces))]
                files = [stack.enter_context(name.open("wb")) for name in names]
                for file, piece in zip(files, pieces, strict=True):
                    _begin(file, (count, *piece.shape[1:]))
            for file, piece in zip(files, pieces, strict=True):
                file.write(piece.contiguous().numpy().tobytes())
    record = {"key": key, "files": [f"{i}.npy" for i in range(len(files))]}
    (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _begin(file: Any, shape: tuple[int, ...]) -> None:
    """Write the head of an array file. A memory map would end in SIGBUS on a full disk."""
    head = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
