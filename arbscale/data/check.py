"""Which files of a folder would be used, converted or skipped, and why."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from arbscale.coords import Size
from arbscale.data.folders import SPLITS, open_folder, scan_folder
from arbscale.data.images import open_image, open_upright, reason
from arbscale.store import InputError

SHOWN = 5  # names printed of each group


@dataclass(frozen=True)
class FileReport:
    """What happens to one file: its size (height, width) if it is used, else the problem."""

    name: str
    size: Size | None = None
    conversions: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class FolderReport:
    """What happens to a folder's image files, and which other files are passed over and why."""

    root: Path
    files: list[FileReport]
    passed_over: list[tuple[str, str]]

    @property
    def used(self) -> list[FileReport]:
        """Return the files that can be used."""
        return [file for file in self.files if not file.problem]

    def summary(self) -> str:
        """Return counts, with the names of the first files of each kind."""
        lines = [f"{self.root}: {len(self.used)} of {len(self.files)} image files can be used"]
        if sizes := sorted((h * w, h, w) for h, w in (f.size for f in self.used if f.size)):
            small, large = (f"{h} x {w}" for _, h, w in (sizes[0], sizes[-1]))
            lines.append(f"sizes (height x width): from {small} to {large}")
        lines += _grouped("converted", [(f.name, c) for f in self.files for c in f.conversions])
        lines += _grouped("skipped", [(f.name, f.problem) for f in self.files if f.problem])
        return "\n".join(lines + _grouped("passed over", self.passed_over))

    def listing(self) -> str:
        """Return one line per file: its size or "skipped", its name, and what happens to it."""
        lines = []
        for file in self.files:
            size = f"{file.size[0]} x {file.size[1]}" if file.size else "skipped"
            why = "; ".join(file.conversions) or file.problem
            lines.append(f"{size:>13}  {file.name}" + (f"  ({why})" if why else ""))
        return "\n".join(lines)


def check_folder(root: str | Path) -> FolderReport:
    """Decode every image below a folder and report what `ImageFolder` makes of it."""
    root = Path(root)
    names, passed_over = scan_folder(root)
    files = [check_file(root, name) for name in tqdm(names, desc="checking", unit="file")]
    return FolderReport(root, files, passed_over)


def check_file(root: Path, name: str) -> FileReport:
    """Decode one image and report what happens to it."""
    try:
        with open_image(root / name) as image:
            rgb, _, notes = open_upright(image)
            notes = _by_content(image, root / name) + notes
            return FileReport(name, tuple(rgb.shape[1:]), tuple(notes))
    except (InputError, FileNotFoundError) as error:
        return FileReport(name, problem=reason(error.__cause__ or error))


def splits(root: Path) -> str:
    """Return how many images `open_dataset` would find in each split."""
    lines = []
    for split in SPLITS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the report has said it already
                lines.append(f"{split}: {len(open_folder(root, split))}")
        except (InputError, FileNotFoundError) as error:
            lines.append(f"{split}: none ({error})")
    return "\n".join(lines)


def _by_content(image: Any, path: Path) -> list[str]:
    """Return a note where a file's ending names another format than its content."""
    from PIL import Image

    wanted = Image.registered_extensions().get(path.suffix.lower())
    same = image.format in (wanted, "MPO" if wanted == "JPEG" else wanted)
    return [] if same else [f"{image.format} by its content"]


def _grouped(title: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines for (name, kind), grouped by kind, the largest group first."""
    groups = defaultdict(list)
    for name, kind in pairs:
        groups[kind].append(name)
    lines = [f"{title}:"] if pairs else []
    for kind, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"{len(names):6} {kind}: {', '.join(names[:SHOWN])}{more}")
    return lines
