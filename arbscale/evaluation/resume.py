"""Pieces of a long evaluation on disk, so that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

PROTOCOL = "protocol.json"


class Partial:
    """A folder of finished pieces, each computed once.

    Pieces are written to another name first and renamed, so a piece that is there is whole. They
    hold for one `protocol` (anything that JSON can hold): another one clears the folder. Without a
    folder the pieces live in a temporary one. ValueError for a folder that holds something else.
    """

    def __init__(self, folder: Path | None, protocol: dict):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="arbscale-")
        self.folder = folder or Path(self._temporary.name)
        key = json.dumps(protocol, indent=2, sort_keys=True)
        kept = self.folder / PROTOCOL
        if not kept.is_file() or kept.read_text(encoding="utf-8") != key:
            if folder and folder.is_dir():
                self._clear(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(kept, lambda path: path.write_text(key, encoding="utf-8"))

    def numbers(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the piece of that name as JSON gives it back, computed if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            text = json.dumps(compute())
            self._write(path, lambda p: p.write_text(text, encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name, computed if they are not there."""
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            values = {key: x.contiguous() for key, x in compute().items()}
            self._write(path, lambda p: save_file(values, p))
        return load_file(path)

    def finish(self) -> None:
        """Remove the folder."""
        if self._temporary:
            self._temporary.cleanup()
        else:
            shutil.rmtree(self.folder)

    def _clear(self, folder: Path) -> None:
        if any(folder.iterdir()) and not (folder / PROTOCOL).is_file():
            raise ValueError(
                f"{folder} is where finished pieces would be kept, and holds something else; move "
                "it, or name another output"
            )
        shutil.rmtree(folder)

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        unfinished = path.with_name(f"{path.name}.unfinished")
        write(unfinished)
        unfinished.replace(path)
