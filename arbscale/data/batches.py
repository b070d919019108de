"""Many image files at once: which output belongs to which input, and what is finished already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from arbscale import store
from arbscale.data.folders import EXTENSIONS, scan_folder

RECORDS = ".arbscale"  # a folder beside the images, with a note for each that is finished


def targets(images: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Pair each image with the file to write: one with `output`, several with files inside it.

    A folder stands for all images below it, which keep their place. Raises InputError for none, for
    two of one name, and where what is written would be read the next time.
    """
    if len(images) == 1 and not images[0].is_dir() and not output.is_dir():
        return [(images[0], output)]
    if output.suffix.lower() in EXTENSIONS and not output.is_dir():
        raise store.InputError(f"{output}: several images go into a folder; name one")
    pairs = [(path, output / name) for image in images for name, path in _inside(image)]
    read = {os.path.realpath(image) for image in images}
    for target in (os.path.realpath(target) for _, target in pairs):
        if not read.isdisjoint((target, *map(str, Path(target).parents))):
            raise store.InputError(f"{target} lies where images are read; name another folder")
    if len({target for _, target in pairs}) < len(pairs):
        raise store.InputError(f"two images would be one file in {output}; rename one of them")
    if not pairs:
        raise store.InputError("there is no image; name files, or a folder of them")
    return pairs


def _inside(image: Path) -> list[tuple[str, Path]]:
    """Return the images that a path stands for, and the name that each keeps."""
    if not image.is_dir():
        return [(image.name, image)]
    return [(name, image / name) for name in scan_folder(image)[0]]


class Finished:
    """Which images are there already, as these settings (facts that JSON holds) make them."""

    def __init__(self, settings: Iterable[object]):
        self.settings = list(settings)

    def _note(self, image: Path, target: Path) -> str:
        facts = store.content_key(*self.settings, store.sha256(image))
        return json.dumps({"made by": facts, "sha256": store.sha256(target)})

    def _path(self, target: Path) -> Path:
        name = store.content_key(target.name)[:32]  # an image's name leaves no room for an ending
        return target.parent / RECORDS / f"{name}.json"

    def holds(self, image: Path, target: Path) -> bool:
        """Tell whether `target` is what these settings made of this image, unchanged since."""
        try:
            return self._path(target).read_bytes() == self._note(image, target).encode()
        except OSError:  # what is missing is made; who makes it names what cannot be read
            return False

    def add(self, image: Path, target: Path) -> None:
        """Note that `target` was written."""
        store.write_text(self._path(target), self._note(image, target))
