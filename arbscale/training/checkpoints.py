"""Checkpoints that a crash cannot spoil: written aside, moved into place, verified when read.

A checkpoint is a folder `step-<n>` with the tensors as safetensors and a record as JSON that holds
their SHA-256. Until the last rename it has another name, so what is named `step-<n>` is whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arbscale import store
from arbscale.store import InputError

STATE, RECORD = "state.safetensors", "record.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], record: dict, keep: int) -> Path:
    """Write a checkpoint, then remove all but it and the `keep` - 1 before; OSError if it fails.

    Whenever the process or the machine stops, each `step-<n>` in `folder` is old or new, never
    half of either. `record` is anything that JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob(".draft-*"), *folder.glob(".old-*")):  # of a process that was killed
        shutil.rmtree(path)
    draft, final = folder / f".draft-{step:08d}", folder / f"step-{step:08d}"
    try:
        draft.mkdir()
        with store.replacing(draft / STATE) as path:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
        record = {**record, "step": step, "sha256": store.sha256(draft / STATE)}
        store.write_text(draft / RECORD, json.dumps(record))
        if final.exists():
            _remove(final)
        draft.rename(final)
        store.sync(folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise OSError(f"the checkpoint {final} could not be written ({error})") from error
    found = saved(folder)
    place = found.index(final)  # newer ones were damaged: training went on from one before
    for path in found[:place] + found[place + keep :]:
        _remove(path)
    return final


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load_newest(
    folder: Path, kinds: dict[str, type] | None = None
) -> tuple[dict[str, Tensor], dict] | None:
    """Return the newest intact checkpoint's tensors and record, with a warning for damaged ones.

    A record that lacks one of `kinds`, or holds it as another type, is damaged too.
    """
    for path in saved(folder):
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            if store.sha256(path / STATE) != record["sha256"]:
                raise InputError("its SHA-256 is another one")
            if wrong := [k for k, t in (kinds or {}).items() if not isinstance(record[k], t)]:
                raise InputError(f"its record's {wrong[0]} is {record[wrong[0]]!r:.100}")
            return load_file(path / STATE), record
        except (OSError, ValueError, SafetensorError, *store.STRAY) as error:
            warnings.warn(f"{path} is damaged ({error}); taking the one before", stacklevel=2)
    return None


def compare(folder: Path, before: dict, now: dict, allow_changes: bool = False) -> None:
    """Refuse to resume with other settings; ValueError lists those of `now` that differ.

    A setting may be a dict of files with their sizes; then it names the files. `allow_changes`
    turns the error into a warning.
    """
    found = [_difference(k, before[k], v) for k, v in now.items() if k in before]
    changed = f"{folder} was begun with other settings: {'; '.join(filter(None, found))}"
    if any(found) and allow_changes:
        warnings.warn(changed, stacklevel=2)
    elif any(found):
        raise InputError(
            f"{changed}; use those, or another folder, or resume all the same with --allow-changes"
        )


def _difference(name: str, before: object, now: object) -> str:
    """Return what differs, in words, or "" for equal values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        texts = (f"{len(x)} files" if isinstance(x, dict) else x for x in (before, now))
        return "" if before == now else "{} was {} and is {}".format(name, *texts)
    groups = {
        "missing": before.keys() - now.keys(),
        "new": now.keys() - before.keys(),
        "of another size": {k for k in before.keys() & now.keys() if before[k] != now[k]},
    }
    found = [f"{len(g)} {kind} ({', '.join(sorted(g)[:3])})" for kind, g in groups.items() if g]
    if not found and list(before) != list(now):
        found = ["in another order"]
    return f"{name}: {', '.join(found)}" if found else ""


def _remove(path: Path) -> None:
    """Take the checkpoint's name away first: half removed, it must not look like one."""
    shutil.rmtree(path.rename(path.with_name(f".old-{path.name}")))
