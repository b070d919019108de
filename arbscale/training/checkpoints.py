"""Checkpoints that a crash cannot spoil: written aside, moved into place, verified when read.

A checkpoint is a folder `step-<n>` with the tensors as safetensors and a record as JSON that holds
their SHA-256. Until the last rename it has another name, so what is named `step-<n>` is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arbscale.store import sha256

STATE, RECORD = "state.safetensors", "record.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], record: dict, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`; OSError if it cannot be written.

    Whenever the process or the machine stops, each `step-<n>` in `folder` is old or new, never
    half of either. `record` is anything that JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    draft, final = folder / f".draft-{step:08d}", folder / f"step-{step:08d}"
    try:
        draft.mkdir()
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, draft / STATE)
        record = {**record, "step": step, "sha256": sha256(draft / STATE)}
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
        for path in (draft / STATE, draft / RECORD, draft):
            _sync(path)
        if final.exists():
            _remove(final)
        draft.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"the checkpoint {final} could not be written ({error})") from error
    for old in saved(folder)[keep:]:
        _remove(old)
    return final


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return a checkpoint's tensors and its record; ValueError or OSError if it is damaged."""
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    if sha256(path / STATE) != record["sha256"]:
        raise ValueError("its SHA-256 is another one")
    return load_file(path / STATE), record


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """Return the newest intact checkpoint of a folder, with a warning for each damaged one."""
    for path in saved(folder):
        try:
            return load(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.warn(
                f"{path} is damaged ({error}); going back to the one before", stacklevel=2
            )
    return None


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is the old or the new one at every moment."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    _sync(draft)
    draft.replace(path)


def _sweep(folder: Path) -> None:
    """Remove what a stopped process left behind."""
    for path in (*folder.glob(".draft-*"), *folder.glob(".old-*")):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Take the checkpoint's name away first: half removed, it must not look like one."""
    shutil.rmtree(path.rename(path.with_name(f".old-{path.name}")))


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
