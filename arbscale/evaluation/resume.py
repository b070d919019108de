"""Pieces of a long evaluation on disk, so that it can be stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from arbscale import store
from arbscale.unet import launched

T, Item = TypeVar("T"), TypeVar("Item")

FACTS = "facts.json"


class Partial:
    """Finished pieces of an evaluation, each computed once and written whole.

    They hold for the `facts` that decide them (anything that JSON can hold: protocol, weights,
    data), and lie in a sub-folder named after these, so that other facts have other pieces.
    Without a folder the pieces live in a temporary one.
    """

    def __init__(self, folder: Path | None, facts: dict):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="arbscale-")
        self.folder = (folder or Path(self._temporary.name)) / store.content_key(facts)[:12]
        if not (self.folder / FACTS).is_file():
            store.write_text(self.folder / FACTS, json.dumps(facts, indent=2, sort_keys=True))

    def numbers(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the piece of that name as JSON gives it back, computed if it is not there."""
        return kept(self.folder / f"{name}.json", compute)

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name, computed if they are not there."""
        return kept(self.folder / f"{name}.safetensors", compute)

    def finish(self) -> None:
        """Remove the pieces; those of other facts stay."""
        if self._temporary:
            return self._temporary.cleanup()
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):  # not empty
            self.folder.parent.rmdir()


def shared(
    piece: Callable[[Item], T], items: Sequence[Item], what: str, unit: str = "batch"
) -> list[T]:
    """Return `piece(item)` of each item, with a progress bar.

    Processes that were launched together compute a share each, and then read what the others have
    kept: `piece` takes it from one `Partial`.
    """
    rank, ranks = launched()
    bar = tqdm(items[rank::ranks], desc=what, unit=unit, disable=rank > 0)
    mine = {i: piece(item) for i, item in zip(range(rank, len(items), ranks), bar, strict=True)}
    wait_for_all()
    return [mine[i] if i in mine else piece(item) for i, item in enumerate(items)]


def wait_for_all() -> None:
    """Wait until all processes that were launched together are here."""
    if launched()[1] > 1:
        from arbscale.training import process_state

        process_state().wait_for_everyone()


def kept(path: Path, compute: Callable[[], Any], optional: bool = False) -> Any:
    """Return what a file holds, computed and written if it is missing or damaged.

    A `.safetensors` file holds a dict of tensors, a `.json` file anything else. OSError where it
    can be neither read nor written, or a line on stderr if it is `optional`.
    """
    try:
        if path.is_file():
            return _read(path)
    except (ValueError, SafetensorError, RecursionError) as error:
        print(f"{path} is damaged ({error}); its content is computed anew", file=sys.stderr)
    except OSError as error:
        if not optional:
            raise
        print(f"{error}; its content is computed anew", file=sys.stderr)
    value = compute()
    try:
        with store.replacing(path) as draft:
            if path.suffix == ".safetensors":
                save_file({key: x.contiguous() for key, x in value.items()}, draft)
            else:
                draft.write_text(json.dumps(value), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        if not optional:
            raise OSError(f"{path} cannot be written: {error}") from error
        print(f"{path} cannot be written, and is not kept: {error}", file=sys.stderr)
        return value
    return _read(path)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return json.loads(path.read_text(encoding="utf-8"))
