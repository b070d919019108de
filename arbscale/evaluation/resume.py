"""Pieces of a long evaluation on disk, so that it can be stopped and resumed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from arbscale import store

PROTOCOL = "protocol.json"


class Partial:
    """A folder of finished pieces, each computed once and written whole.

    They hold for one `protocol` (anything that JSON can hold): another one clears the folder.
    Without a folder the pieces live in a temporary one. ValueError for a folder that holds
    something else.
    """

    def __init__(self, folder: Path | None, protocol: dict):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="arbscale-")
        self.folder = folder or Path(self._temporary.name)
        key = json.dumps(protocol, indent=2, sort_keys=True)
        kept = self.folder / PROTOCOL
        if kept.is_file() and kept.read_text(encoding="utf-8") == key:
            return
        if folder and folder.is_dir():
            if any(folder.iterdir()) and not kept.is_file():
                raise ValueError(f"{folder} holds something else; move it, or name another output")
            shutil.rmtree(folder)
        store.write_text(kept, key)

    def numbers(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the piece of that name as JSON gives it back, computed if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            store.write_text(path, json.dumps(compute()))
        return json.loads(path.read_text(encoding="utf-8"))

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name, computed if they are not there."""
        return kept_tensors(self.folder / f"{name}.safetensors", compute)

    def finish(self) -> None:
        """Remove the folder."""
        if self._temporary:
            self._temporary.cleanup()
        else:
            shutil.rmtree(self.folder)


def kept_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file, which is computed and written if it is missing."""
    from safetensors.torch import load_file, save_file

    if not path.is_file():
        values = {key: x.contiguous() for key, x in compute().items()}
        with store.replacing(path) as draft:
            save_file(values, draft)
    return load_file(path)
